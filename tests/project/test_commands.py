"""Every command that the pages show is one, and those that need nothing but a checkpoint are run."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from kromhc_hf.cli import app
from kromhc_hf.demo import MODEL


PROJECT = Path(__file__).resolve().parents[2]
PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md"))]
# A folder of the Hub, a shell variable, or results of a long command: tests of their own run these.
ELSEWHERE = ("ORG/", "USER/", "$", "demo", "compare", "serve", "--family", "--derive", "path/to", "doctor")


def shown_commands() -> list[str]:
    """Commands in code of the pages: without comments, what is optional in brackets included."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        inline = re.findall(r"`(kromhc [a-z][^`]*)`", re.sub(r"\s+", " ", text))
        for line in [*re.findall(r"^ *(kromhc [a-z].*)$", text, re.M), *inline]:
            command = re.sub(r"[\[\]]", "", line.partition(" #")[0]).strip()
            # A command with an option alone is spoken of, not shown.
            if re.match(r"kromhc \w+ [^-]", command) and "..." not in command:
                found[command] = None
    return list(found)


def parse(command: str) -> None:
    """Raises an error of the command line, with its exit code, if there is no such command or option."""
    group = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    context = group.make_context("kromhc", [words[0]], resilient_parsing=True)
    name, found, rest = group.resolve_command(context, words)
    assert found is not None, f"no such command: {words[0]}"
    with found.make_context(name, rest, parent=context):
        pass


def test_commands_of_the_pages_are_found():
    commands = shown_commands()
    assert len(commands) > 15
    assert "kromhc verify BASE OUT --layerwise all" in commands


@pytest.mark.parametrize("command", shown_commands())
def test_shown_commands_are_commands(command):
    parse(command)


def test_what_is_no_command_is_told():
    for wrong in ("kromhc convert A B --num-stream 4", "kromhc verify A", "kromhc verfy A B"):
        with pytest.raises(Exception, match=r"[Nn]o such|[Mm]issing"):
            parse(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("commands")


@pytest.mark.parametrize(
    "command", [c for c in shown_commands() if not any(words in c for words in ELSEWHERE) and "adapter" not in c]
)
def test_shown_commands_run(command, kromhc, folder):
    made = folder / "made"
    if not made.exists():
        assert kromhc("convert", MODEL, made, "--no-verify")[0] == 0
    number = len(list(folder.iterdir()))
    (folder / "text.txt").write_text("Once upon a time there was a little girl. " * 9)
    writes = command.split()[1] == "convert"
    places = {
        **dict.fromkeys(("SOURCE", "BASE", "stories15M"), str(MODEL)),
        **dict.fromkeys(("OUT", "DESTINATION", "out"), str(folder / f"out-{number}") if writes else str(made)),
        **dict.fromkeys(("MODEL", "CONVERTED", "EARLIER", "tuned", "fine-tuned", "converted"), str(made)),
        **{
            "FILE": str(folder / "text.txt"),
            "DIR": str(folder / f"out-{number}"),
            "report": str(folder / f"r-{number}"),
        },
        # The model of the package has four layers.
        "8:12": "1:3",
    }
    words = [places.get(word, word) for word in shlex.split(command)[1:]]
    code, _, err = kromhc(*words)
    assert code == 0, err
