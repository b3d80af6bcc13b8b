"""The package as a whole: imports run one way, and the built wheel works where nothing else of the project is."""

import ast
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import kromhc_hf


PACKAGE = Path(kromhc_hf.__file__).parent
PROJECT = PACKAGE.parent
TRAVELS = {"modeling", "decoder_layer", "configuration", "hyper_connection", "mixing", "architectures"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The siblings and the outside packages that a module imports at its top level or anywhere below."""
    siblings, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, path
            assert node.module, f"{path.name} imports the package root"
            siblings.add(node.module)
    return siblings, outside


MODULES = {path.stem: imports(path) for path in PACKAGE.glob("*.py")}


def test_imports_run_one_way():
    order = list(TopologicalSorter({name: siblings for name, (siblings, _) in MODULES.items()}).static_order())
    assert order[-1] in ("__init__", "cli")
    for name, (siblings, outside) in MODULES.items():
        assert "__init__" not in siblings, name
        assert "kromhc_hf" not in outside, name


def test_what_travels_to_the_hub_needs_only_torch_and_transformers():
    files, waiting = set(), set(TRAVELS)
    while waiting:
        name = waiting.pop()
        files.add(name)
        waiting |= MODULES[name][0] - files
    standard = set(sys.stdlib_module_names)
    assert {name: MODULES[name][1] - standard - {"torch", "transformers"} for name in files} == {
        name: set() for name in files
    }
    assert files.isdisjoint({"registration", "conversion", "cli"})


def test_every_public_name_is_documented():
    for name in kromhc_hf.__all__:
        assert (getattr(kromhc_hf, name).__doc__ or "").strip(), name


def test_the_wheel_works_on_its_own(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, PROJECT], check=True)
    (wheel,) = tmp_path.glob("kromhc_hf-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kromhc_hf/demo_data/gpt2-tinystories-1M/model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    script = (
        "import kromhc_hf, pathlib; from transformers import LlamaConfig;"
        "config = kromhc_hf.KromHCConfig(backbone_config=LlamaConfig(hidden_size=16, num_hidden_layers=1,"
        " num_attention_heads=2, intermediate_size=16, vocab_size=20));"
        "print(pathlib.Path(kromhc_hf.__file__).parent.parent, type(kromhc_hf.KromHCForCausalLM(config)).__name__)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert result.stdout.split()[-2:] == [str(tmp_path / "site"), "KromHCLlamaForCausalLM"]
