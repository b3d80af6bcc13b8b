"""What the package asks for beside itself: the table of tools it goes beside, and the bounds that are promised."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from torches import run as torches


sys.path.append(str(Path(__file__).resolve().parents[2]))
from scripts import resolve


PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "docs" / "installs-beside.md").read_text(encoding="utf-8")


def bounds() -> dict[str, Requirement]:
    """What pyproject.toml asks for with a bound, in its own list or in an extra, by name."""
    asked = map(Requirement, re.findall(r'"([\w-]+[<>=~][^"]*)"', (PROJECT / "pyproject.toml").read_text("utf-8")))
    return {requirement.name: requirement for requirement in asked if requirement.name in resolve.BOUNDED}


def lower(requirement: Requirement) -> Version:
    (version,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
    return version


def test_the_table_has_the_tools_of_the_script_and_versions_within_the_bounds():
    table = PAGE.partition(resolve.BEGIN)[2].partition(resolve.END)[0]
    assert re.match(r"\nResolved on \d{4}-\d\d-\d\d by pip [\d.]+ on \w+.*, with `make resolve`\.\n", table)
    assert "://" not in table
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines() if "|" in line)
    assert head[-len(resolve.BOUNDED) :] == list(resolve.BOUNDED)
    assert tuple(f"{row[0]}=={row[1]}" for row in rows) == resolve.TOOLS
    for row in rows:
        resolved = row[3].startswith("yes")
        assert resolved or row[3].startswith("not without this package either"), row
        for name, version in zip(resolve.BOUNDED, row[4:], strict=True):
            assert bounds()[name].specifier.contains(version) if resolved else not version, (row, name)


def test_every_lower_bound_is_run_and_told():
    asked = bounds()
    assert tuple(sorted(asked)) == tuple(sorted(resolve.BOUNDED))
    pins = map(Requirement, re.findall(r"^[\w-]+==.*", (PROJECT / "constraints-floor.txt").read_text("utf-8"), re.M))
    floor = {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    # torch is the exception that the page names: old releases have no build for CPUs alone to run all tests with.
    assert floor == {name: lower(requirement) for name, requirement in asked.items() if name != "torch"}
    page = " ".join((PROJECT / "docs" / "installs-beside.md").read_text(encoding="utf-8").split())
    for name, version in floor.items():
        assert f"{name} {version}" in page
    assert (
        f"On torch from {lower(asked['torch'])} on those of the arithmetic [have been run](torch-releases.md)" in page
    )


def test_every_release_of_torch_has_been_run_and_is_told():
    page = PROJECT / "docs" / "torch-releases.md"
    found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    assert tuple(found) == torches.RELEASES
    assert Version(torches.RELEASES[0]) in bounds()["torch"].specifier
    assert Version(torches.RELEASES[0]).release[:2] == lower(bounds()["torch"]).release[:2]
    assert not any(row["failed"] for row in found.values())
    assert torches.table(found) in page.read_text(encoding="utf-8")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Turns pip to a folder of wheels alone, and writes them: `index("tool", "1.0", "library<2")` -> its path."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    def write(name: str, version: str, *requirements: str) -> Path:
        path, info = tmp_path / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
        metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Provides-Extra: peft"]
        metadata += [f"Requires-Dist: {requirement}" for requirement in requirements]
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
        return path

    for version in ("5.6", "5.24", "6.0"):
        write("transformers", version)
    return write


@pytest.mark.parametrize(
    ("needs", "beside", "transformers", "ours"),
    [
        ("transformers<5.20", r"yes", "5.6", False),
        ("transformers", r"yes; transformers 6\.0 becomes 5\.24", "5.24", False),
        ("transformers>=6", r"no: Cannot install ours==1\.0 and tool==1\.0 because .* conflicting .*", None, True),
        ("transformers>=7", r"not without this package either: Could not find .* transformers>=7 .*", None, False),
    ],
    ids=["as alone", "other versions", "not beside", "not alone"],
)
def test_a_tool_is_resolved_alone_and_beside(index, needs, beside, transformers, ours):
    index("tool", "1.0", needs)
    wheel = index("ours", "1.0", "transformers>=5.6,<6")
    outcome = resolve.resolve_beside("tool==1.0", str(wheel), [sys.executable])
    assert re.fullmatch(beside, outcome.beside)
    assert (outcome.versions.get("transformers"), outcome.ours) == (transformers, ours)


def test_the_command_writes_the_table_and_exits_with_1_for_a_conflict_of_ours(index, tmp_path, monkeypatch, capsys):
    index("good", "1.0", "transformers<5.20")
    index("bad", "1.0", "transformers>=6")
    index("peft", "0.18")
    wheel = index("ours", "1.0", "transformers<6", 'peft; extra == "peft"')
    monkeypatch.setattr(resolve, "build_wheel", lambda folder: wheel)
    monkeypatch.setattr(resolve, "TOOLS", ("good==1.0",))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{resolve.BEGIN}\nold\n{resolve.END}\nafter\n", encoding="utf-8")
    assert resolve.main(["--write", str(page)]) == 0
    assert "| good | 1.0 | " in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert re.search(r"before\n.*begin -->\nResolved on .*\n\n\| tool .*\n\|---.*\n\| good .*\n<!.*\nafter\n", text)
    assert re.search(r"\| good \| 1\.0 \| \d\S+ \| yes \| 5\.6 \|  \|  \|  \| 0\.18 \|  \|\n", text)
    assert resolve.main(["good==1.0", "bad==1.0"]) == 1
    assert page.read_text(encoding="utf-8") == text
    with pytest.raises(SystemExit):
        resolve.main(["good==1.0", "--write", str(page)])
    assert "--write is for the whole table" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must have the markers"):
        resolve.write_table(PROJECT / "CHANGELOG.md", "")
