"""The page of tools: made from its results, complete, no failure of ours; a run keeps what it did not repeat."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest


sys.path.append(str(Path(__file__).resolve().parents[2]))
from clients import run
from clients.client import Check, Client, models_in, same
from clients.inside import outcome_of


PROJECT = Path(__file__).resolve().parents[2]
PAGE = PROJECT / "docs" / "works-with.md"
OUTCOMES = {"works", "fails for the base alike", "read from source", "not run yet"}


def results(file: Path = PAGE) -> dict:
    return json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))


def test_the_page_is_made_of_its_results():
    text = PAGE.read_text(encoding="utf-8").partition(run.BEGIN)[2].partition(run.END)[0]
    assert text.strip() == run.page(results(), run.clients())
    assert "://" not in json.dumps(results())
    assert f"]({PAGE.name})" not in text


def test_every_client_is_listed_with_every_check():
    found = results()
    assert set(found) <= set(run.clients())
    for name, client in run.clients().items():
        found.setdefault(name, run.not_run(client))
        assert [row["what"] for row in found[name]["rows"]] == [check.what for check in client.checks] or [""], name
        assert {row["outcome"] for row in found[name]["rows"]} <= OUTCOMES, name
        assert bool(client.checks) != bool(client.source), name
        assert "==" in client.requirements[0], f"{name}: a second run must ask the same question"
        if found[name]["date"] and client.checks:
            assert all(found[name]["versions"].values()), name


def test_clients_are_imported_without_their_tools():
    assert not {"lm_eval", "mergekit", "vllm", "deepspeed", "liger_kernel"} & set(sys.modules)
    for name in run.clients():
        importlib.import_module(f"clients.{name}")
    assert not {"lm_eval", "mergekit", "vllm", "deepspeed", "liger_kernel"} & set(sys.modules)


def raises(models, work):
    raise ValueError("some\nreason")


@pytest.mark.parametrize(
    ("check", "outcome", "seen"),
    [
        (Check("", lambda models, work: 1.5, same), "works", "the numbers of the base: 1.5"),
        (Check("", lambda models, work: models.kind, same), "fails", "AssertionError: the base gives base, .*"),
        (Check("", raises, same), "fails for the base alike", "ValueError: reason"),
        (Check("", lambda models, work: models.kind == "base" or raises(0, 0), same), "fails", "ValueError: reason"),
        (Check("", raises), "fails", "ValueError: reason"),
        (Check("", lambda models, work: f"seen with {models.kind}"), "works", "seen with converted"),
    ],
    ids=["works", "differs", "base fails", "converted fails", "alone fails", "alone works"],
)
def test_the_base_is_the_control(tmp_path, check, outcome, seen):
    found = outcome_of(check, tmp_path, tmp_path / "work")
    assert found[0] == outcome
    assert re.fullmatch(seen, found[1])


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three clients, of which `bad` fails, on a page of their own; the models are not made."""
    checks = {"bad": Check("a run", raises), "good": Check("a run", lambda models, work: "fine")}
    listed = {name: Client(name, (f"{name}==1.0",), f"how {name} is used", (check,)) for name, check in checks.items()}
    listed["read"] = Client("read", ("read==1.0",), "how", source="its source says so")

    def fake(name, client, models, work):
        outcome, seen = outcome_of(client.checks[0], models, work)
        row = {"what": "a run", "outcome": outcome, "seen": seen}
        return {"date": "2026-01-01", "versions": {name: "1.0"}, "rows": [row]}

    real = run.run
    monkeypatch.setattr(run, "run", lambda *arguments: (real if arguments[1].source else fake)(*arguments))
    monkeypatch.setattr(run, "clients", lambda: listed)
    monkeypatch.setattr(run, "SUMMARY", tmp_path / "summary.json")
    monkeypatch.setattr(run.subprocess, "run", lambda *arguments, **options: None)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\nold\n{run.END}\nafter\n")
    return page


def test_a_run_writes_its_rows_keeps_others_and_exits_with_1_for_a_failure(three, capsys):
    assert run.main(["good", "read", "--write", str(three)]) == 0
    assert run.main(["bad", "--write", str(three)]) == 1
    assert list(results(three)) == ["bad", "good", "read"]
    text = three.read_text()
    assert "| good | 2026-01-01 | good 1.0 | a run | works | fine |" in text
    assert "| bad | 2026-01-01 | bad 1.0 | a run | fails | ValueError: reason |" in text
    assert "| read from source | its source says so |" in text
    assert "## good\n\nhow good is used\n" in text
    assert run.page({}, {"good": run.clients()["good"]}).splitlines()[2] == "| good |  |  | a run | not run yet |  |"
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    with pytest.raises(SystemExit):
        run.main(["better"])
    assert "there is no client better; there are bad, good, read." in capsys.readouterr().err


def test_models_are_found_by_kind(tmp_path):
    models = models_in(tmp_path, "converted")
    assert (models.converted, models.plain, models.start) == (
        True,
        tmp_path / "base/start",
        tmp_path / "converted/start",
    )
