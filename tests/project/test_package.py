"""The package as a whole: imports run one way, and the built wheel works where nothing else of the project is."""

import ast
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from pathlib import Path

import kromhc_hf
from kromhc_hf.modeling.remote_code import code_files


PACKAGE = Path(kromhc_hf.__file__).parent
PROJECT = PACKAGE.parent


def name_of(path: Path) -> str:
    """`modeling/mixing.py` -> `modeling.mixing`, `modeling/__init__.py` -> `modeling`, the root's own -> ``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The modules of the package and the outside packages that a module imports, at its top level or anywhere below."""
    inside, outside = set(), set()
    folder = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            parents = folder[: len(folder) + 1 - node.level]
            if node.module:
                inside.add(".".join((*parents, node.module)))
            else:
                inside |= {".".join((*parents, alias.name)) for alias in node.names}
    return inside, outside


MODULES = {name_of(path): imports(path) for path in PACKAGE.rglob("*.py")}


def test_imports_run_one_way():
    for name, (inside, outside) in MODULES.items():
        assert inside <= MODULES.keys(), name
        assert "" not in inside, f"{name} imports the package root"
        assert "kromhc_hf" not in outside, f"{name} imports the package root"
    # Raises where there is a circle.
    list(TopologicalSorter({name: inside for name, (inside, _) in MODULES.items()}).static_order())


def test_what_travels_imports_nothing_outside_itself():
    travelling = {name for name in MODULES if name.startswith("modeling.")}
    assert len(travelling) > 20
    for name in travelling:
        inside, outside = MODULES[name]
        assert inside <= travelling, name
        assert outside - set(sys.stdlib_module_names) <= {"torch", "transformers"}, name
        tree = ast.parse((PACKAGE / name.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                # The loader of transformers follows `from .x import y` alone.
                assert node.level == 1, name
                assert node.module, name


def test_what_travels_is_the_folder():
    folder = PACKAGE / "modeling"
    assert set(code_files()) == {path for path in folder.glob("*.py") if path.stem != "__init__"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} <= {"__pycache__"}


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
