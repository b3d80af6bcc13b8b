"""The package as a whole: the rules of its layout, and the built wheel works where nothing else of the project is."""

import ast
import re
import subprocess
import sys
import zipfile
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import kromhc_hf
from kromhc_hf.modeling.remote_code import code_files


PACKAGE = Path(kromhc_hf.__file__).parent
PROJECT = PACKAGE.parent
CODE = ("kromhc_hf", "tests", "benchmarks", "examples", "scripts")
# Lines of a file, and identical lines in a row.
LONGEST, RUN = 300, 6


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


# Verbs and their inverses, by the module that both stand in.
INVERSES = {
    "applying": ("apply_hyper_connections", "remove_hyper_connections"),
    "modeling.installation": ("install", "uninstall"),
    "modeling.decoder_layer": ("connect_layer", "disconnect_layer"),
    "training": ("hyper_connection_state_dict", "load_hyper_connection_state_dict"),
    "conversion.hyper_connection_file": ("save_hyper_connections", "load_hyper_connections"),
    "peft.layer": ("adapt_layer", "restore_layer", "adapt_owners", "restore_owners"),
    "peft.conversion": (
        *("adapter_to_model", "model_to_adapter", "adapter_to_checkpoint", "checkpoint_to_adapter"),
        *("model_keys", "adapter_keys"),
    ),
}


@pytest.mark.parametrize("module", INVERSES)
def test_verbs_stand_beside_their_inverses(module):
    tree = ast.parse((PACKAGE / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert set(INVERSES[module]) <= set(defined)
    for name in INVERSES[module]:
        elsewhere = [m for m in MODULES if m != module and re.search(rf"^def {name}\(", source(m), re.MULTILINE)]
        assert elsewhere == [], name


def source(module: str) -> str:
    path = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def test_files_are_short_or_say_why_not():
    files = [path for folder in CODE for path in (PROJECT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= LONGEST or "longer than" in "\n".join(lines[:10]), f"{path} has {len(lines)} lines"


def test_every_module_of_the_package_is_written_for_the_oldest_python():
    """The one that requires-python in pyproject.toml promises."""
    (minor,) = re.findall(r'requires-python = ">=3\.(\d+)"', (PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    for path in PACKAGE.rglob("*.py"):
        ast.parse(path.read_text(encoding="utf-8"), filename=str(path), feature_version=(3, int(minor)))


def lines_of_code(path: Path) -> list[str]:
    """The lines of a module without imports, comments, blanks and lone punctuation."""
    text = path.read_text(encoding="utf-8")
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = (line.strip() for number, line in enumerate(text.splitlines(), start=1) if number not in skipped)
    return [line for line in lines if re.search(r"\w", line) and not line.startswith("#")]


def test_no_six_lines_of_the_package_stand_twice():
    seen: dict[tuple[str, ...], str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = lines_of_code(path)
        for i in range(len(lines) - RUN + 1):
            run = tuple(lines[i : i + RUN])
            assert run not in seen, f"{path.name} has six lines that {seen[run]} has as well: {run}"
            seen[run] = path.name
    assert len(seen) > 4000


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("configuration", ["KromHCConfig", "KromHCLlamaConfig"]),
        ("modeling", ["KromHCForCausalLM", "KromHCModel", "KromHCLlamaForCausalLM", "KromHCLlamaConfig"]),
        ("conversion", ["convert_checkpoint", "verify_conversion", "ConversionReport"]),
        ("layerwise", ["LayerwiseModel"]),
        ("peft_conversion", ["adapter_to_model", "model_to_adapter"]),
    ],
)
def test_documented_import_paths_stay(module, names):
    """Public names where they were first documented, and generated classes, which pickles look up by name."""
    found = import_module(f"kromhc_hf.{module}")
    for name in names:
        thing = getattr(found, name)
        assert thing.__name__ == name
        assert getattr(kromhc_hf, name, thing) is thing
    with pytest.raises(AttributeError, match="KromHCNothing"):
        _ = found.KromHCNothing


def test_every_public_name_is_documented():
    for name in kromhc_hf.__all__:
        assert (getattr(kromhc_hf, name).__doc__ or "").strip(), name


def test_the_wheel_works_on_its_own(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, PROJECT], check=True)
    (wheel,) = tmp_path.glob("kromhc_hf-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "kromhc_hf/demo_data/gpt2-tinystories-1M/model.safetensors" in names
    modules = {path.relative_to(PROJECT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
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
