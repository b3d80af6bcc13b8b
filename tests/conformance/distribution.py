"""transformers' own test suite: fetched with the source distribution of the installed version, cached, imported."""

import importlib
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import transformers
from filelock import FileLock


CACHE = Path(__file__).resolve().parents[2] / ".cache"
PACKAGE = "transformers_tests"

# What the suite imports and the distribution leaves out. Without them their tests do not exist.
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def fetch_suite(cache: Path = CACHE, version: str = transformers.__version__) -> Path:
    """The folder `transformers_tests` of this version, fetched from the package index unless it is cached.

    Raises:
        RuntimeError: if the source distribution cannot be fetched; the conformance tests are not skipped then.
    """
    folder = cache / f"transformers-{version}" / PACKAGE
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "__init__.py").is_file():
            extract_tests(download(version, folder.parent), folder)
    return folder


def download(version: str, destination: Path) -> Path:
    """The archive of the source distribution, downloaded unless it is there."""
    archive = destination / f"transformers-{version}.tar.gz"
    if archive.is_file():
        return archive
    command = [sys.executable, "-m", "pip", "download", f"transformers=={version}", "--dest", str(destination)]
    command += ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not archive.is_file():
        raise RuntimeError(
            f"the conformance tests need the source distribution of transformers {version}, which pip could not "
            f"fetch from the package index:\n{done.stderr.strip()}\n"
            f"Connect to an index, or put {archive.name} into {destination}."
        )
    return archive


def extract_tests(archive: Path, folder: Path) -> None:
    """Takes the top level of `tests/` out of the archive; `__init__.py` comes last, as the sign that it is complete."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests":
                source = tar.extractfile(member)
                assert source is not None
                (folder / parts[2]).write_bytes(source.read())
    (folder / "__init__.py").touch()


def import_suite(name: str) -> types.ModuleType:
    """A module of the suite, `import_suite("test_modeling_common")`."""
    folder = fetch_suite()
    if str(folder.parent) not in sys.path:
        sys.path.insert(0, str(folder.parent))
    for path, class_name in ABSENT.items():
        parent = f"{PACKAGE}.{path.split('.')[0]}"
        for module_name in (parent, f"{PACKAGE}.{path}"):
            sys.modules.setdefault(module_name, types.ModuleType(module_name))
        setattr(sys.modules[f"{PACKAGE}.{path}"], class_name, type(class_name, (), {}))
    return importlib.import_module(f"{PACKAGE}.{name}")
