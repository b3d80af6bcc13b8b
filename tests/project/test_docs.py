"""The documentation: its numbers are those that its command prints, and its examples work."""

import json
import re
import runpy
from itertools import combinations
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kromhc_hf
from kromhc_hf import doubly_stochastic_error
from kromhc_hf.modeling.mixing import DenseMixing
from kromhc_hf.modeling.modeling_kromhc import FROM_SCRATCH
from kromhc_hf.modeling.variants import VARIANTS
from kromhc_hf.study.report import table, with_error
from kromhc_hf.study.statistics import paired_difference


PROJECT = Path(__file__).resolve().parents[2]
DOCS = PROJECT / "docs"
# Those who change the package need more than those who use it.
CONTRIBUTOR_GUIDES = ("add-a-family.md", "add-a-variant.md")


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> Path:
    """The folder with what `python scripts/draw_figures.py` draws, and what it prints in `printed.txt`."""
    folder = tmp_path_factory.mktemp("figures")
    script = runpy.run_path(str(PROJECT / "scripts" / "draw_figures.py"))
    lines: list[str] = []
    script["main"].__globals__.update(FOLDER=folder, print=lambda *words: lines.append(" ".join(map(str, words))))
    script["main"]()
    (folder / "printed.txt").write_text("\n".join(lines))
    return folder


def test_numbers_of_the_explanation(figures):
    printed, page = (figures / "printed.txt").read_text(), (DOCS / "method.md").read_text(encoding="utf-8")
    errors = dict(re.findall(r"sum error after 24 branches, (\w+): (\S+)", printed))
    exact = {variant for variant in errors if VARIANTS[variant].doubly_stochastic == "exactly"}
    assert exact == {variant for variant, error in errors.items() if float(error) < 1e-6}
    lines = re.findall(r"parameters, (\w+): (.*)", printed)
    counts = {variant: dict(re.findall(r"n=(\d+) ([\d,]+\d)", line)) for variant, line in lines}
    quoted = [errors["mhc"], errors["hc"], *(counts[v][n] for v in ("kromhc", "mhc") for n in ("4", "16"))]
    for logit in (4, 8):
        (pair,) = re.findall(rf"residual logit {logit}: off-identity mass (\S+), gradient (\S+)", printed)
        quoted += pair
    for number in quoted:
        assert number in page, number


def test_figures_are_those_of_the_command(figures):
    drawn = {path.name for path in figures.glob("*.svg")}
    assert drawn == {path.name for path in (DOCS / "figures").iterdir()}
    used = re.findall(r"\(figures/([^)]+)\)", (DOCS / "method.md").read_text(encoding="utf-8"))
    assert set(used) == drawn


def test_every_page_is_in_the_navigation():
    navigation = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)", navigation)) == pages


def test_the_variant_of_the_guide_works():
    page = (DOCS / "how-to" / "add-a-variant.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    names = {"torch": torch, "F": F, "Tensor": Tensor, "DenseMixing": DenseMixing}
    exec("\n".join(line[4:] for line in code.splitlines()), names)
    mixing = names["MeanMixing"](4)
    logits = torch.randn(5, mixing.num_logits)
    # Row and column sums of 4 rounded entries.
    assert doubly_stochastic_error(mixing.matrix(logits)) < 8 * torch.finfo(torch.float32).eps
    streams = torch.randn(5, 1, 8).expand(5, 4, 8)
    assert torch.equal(mixing.mix(streams, logits), streams)
    start = mixing.matrix(mixing.initial_logits(4.0))
    assert torch.equal(start.argmax(1), torch.arange(4))


def test_tables_of_the_evidence_are_those_of_the_summaries():
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    summaries = {path.stem: json.loads(path.read_text()) for path in (DOCS / "evidence").glob("*.json")}
    studies = {path.stem for path in (PROJECT / "benchmarks" / "studies").glob("*.yaml")}
    assert studies - set(summaries) == {"d6"}, "what has not been run, as the page says"
    assert set(summaries) < studies
    for name, summary in summaries.items():
        assert table(summary) in page, name
        assert {f"{name}-curves.png", f"{name}-differences.png"} <= {p.name for p in (DOCS / "evidence").iterdir()}


def test_what_the_evidence_says_about_pairs_of_arms():
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")
    summaries = (
        json.loads((DOCS / "evidence" / f"{name}.json").read_text()) for name in ("retrofit", "scratch", "shakespeare")
    )
    retrofit, scratch, shakespeare = (
        {name: arm["losses"] for name, arm in summary["arms"].items()} for summary in summaries
    )
    four_streams = ["identity", "mhc", "mhc_lite", *(f"kromhc{tail}" for tail in ("", " logit 2", " logit 8"))]
    four_streams += [name for name in retrofit if "unequal writes" in name or "readout" in name or "embedding" in name]
    from_scratch = ["branch scale .769", "hc", "mhc", "kromhc", "identity", "one_sided"]
    assert len(four_streams) == 12
    for arms, names in ((retrofit, four_streams), (scratch, from_scratch)):
        for one, other in combinations(names, 2):
            assert not paired_difference(arms[one], arms[other]).separates, (one, other)
    against_control = paired_difference(scratch["kromhc"], scratch["branch scale .769"])
    assert f"minus that control is {with_error(against_control._asdict(), '+')}, not told apart" in page
    for arm in ("kromhc", "branch scale .769", "residual wider", "branch scale learned", "kromhc lossless init"):
        assert with_error(paired_difference(scratch[arm], scratch["residual"])._asdict(), "+") in page, arm
    for arm in ("kromhc", "circulant", "mhc", "hc", "branch scale .769"):
        difference = paired_difference(shakespeare[arm], shakespeare["residual"])
        assert with_error(difference._asdict(), "+") in page, arm
        assert not difference.separates, arm
    for one, other in (("kromhc static", "kromhc"), ("kromhc logit 8", "kromhc logit 2")):
        number = with_error(paired_difference(retrofit[one], retrofit[other])._asdict(), "").replace("0.", ".")
        assert number in page, number


def test_what_is_said_about_training_from_scratch():
    summary = json.loads((DOCS / "evidence" / "scratch.json").read_text())
    scratch = {name: arm["losses"] for name, arm in summary["arms"].items()}
    lossless = paired_difference(scratch["kromhc lossless init"], scratch["residual"])
    paper = paired_difference(scratch["kromhc"], scratch["residual"])
    assert not lossless.separates
    # What the warning of a model from a configuration says.
    assert "it was not told apart from the plain residual, and hc_init='paper' was ahead of both" in FROM_SCRATCH
    for other in ("residual", "kromhc lossless init"):
        difference = paired_difference(scratch["kromhc"], scratch[other])
        assert difference.separates
        assert difference.mean < 0
    steps = summary["arms"]["kromhc lossless init"]["settings"]["steps"]
    page = " ".join((DOCS / "limits.md").read_text(encoding="utf-8").split())
    before, after = (with_error(difference._asdict(), "+") for difference in (lossless, paper))
    assert f"was at {before} nats against the plain residual after {steps} steps, and at {after} with" in page
    assert f"({lossless.seeds} paired seeds;" in page


def test_what_the_evidence_says_about_a_frozen_base():
    arms = json.loads((DOCS / "evidence" / "adapters.json").read_text())["arms"]
    page = (DOCS / "evidence.md").read_text(encoding="utf-8")

    def loss(name: str) -> str:
        return f"{arms[name]['final_loss']['mean']:.3f} with {arms[name]['trainable']:,}"

    assert f"held-out loss {loss('lora rank 4')} against {loss('kromhc alone')})" in page
    both = min(("lora and kromhc", "lora and kromhc ratio 3"), key=lambda name: arms[name]["final_loss"]["mean"])
    assert f"({loss(both)}, at the better of two ratios) are no better than LoRA alone ({loss('lora rank 9')})" in page


def test_what_streams_cost_is_the_same_on_every_page():
    evidence, performance, readme = (
        " ".join(path.read_text(encoding="utf-8").split())
        for path in (DOCS / "evidence.md", DOCS / "performance.md", PROJECT / "README.md")
    )
    eager, compiled = (
        f"{float(times):.2f}"
        for name in ("kromhc", "kromhc, compiled")
        for times in re.findall(rf"\| {name} \| \d+ \| \d+ \| ([\d.]+) \| \d+ \|", performance)
    )
    assert f"no less at C = 512: {eager} times, {compiled} compiled" in evidence
    assert f"C = 512 takes {eager} times as long with four streams and {compiled} times compiled" in readme
    small, large = (
        json.loads((DOCS / "evidence" / f"{study}.json").read_text())["arms"]["kromhc"]["cost"]
        for study in ("retrofit", "stories15M")
    )
    assert f"cost is {small:.2f} times the step in stories260K and {large:.2f} times in stories15M" in evidence
    assert float(eager) >= large - 0.005


def texts_for_users() -> dict[str, str]:
    """What people read who use the package: pages, examples and the cells of the notebook, without its outputs."""
    pages = [PROJECT / "README.md", *DOCS.rglob("*.md"), *(PROJECT / "examples").glob("*.py")]
    texts = {
        str(p.relative_to(PROJECT)): p.read_text(encoding="utf-8") for p in pages if p.name not in CONTRIBUTOR_GUIDES
    }
    notebook = nbformat.read(PROJECT / "examples" / "tour.ipynb", as_version=4)
    return {**texts, "examples/tour.ipynb": "\n".join(cell.source for cell in notebook.cells)}


def names_below_the_root(text: str) -> set[str]:
    """The names of the package that a text uses and that are not among those that its root exports."""
    text = text.replace("python -m kromhc_hf.families_table", "")
    text = re.sub(r"\bkromhc_hf\.__file__", "", text)
    used = set(re.findall(r"\bkromhc_hf((?:\.\w+)+)", text))
    for names in re.findall(r"\bfrom kromhc_hf import (\([^)]*\)|[^\n;#]*)", text):
        used |= {f".{name}" for name in re.findall(r"(?:^|[(,])\s*(\w+)", names)}
    return {name for name in used if name.split(".")[1] not in kromhc_hf.__all__}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from kromhc_hf.demo import MODEL", {".demo"}),
        ("from kromhc_hf import inspect_model, plots", {".plots"}),
        ("from kromhc_hf import (\n    inspect_model as look,\n    plots,\n)", {".plots"}),
        ("import kromhc_hf.demo", {".demo"}),
        ("use `kromhc_hf.parameter_counts.count_parameters`.", {".parameter_counts.count_parameters"}),
        ("`kromhc_hf.Mappings.h_pre`, kromhc_hf/families.py, Path(kromhc_hf.__file__)", set()),
        ("kromhc_hf. And then `python -m kromhc_hf.families_table docs/models.md README.md`", set()),
        ("from kromhc_hf import KromHCPeftConfig  # plots, and more", set()),
    ],
)
def test_names_below_the_root_are_found(text, found):
    assert names_below_the_root(text) == found


def test_users_are_told_names_of_the_root_alone():
    texts = texts_for_users()
    assert {"README.md", "docs/how-to/inspect.md", "examples/scaffold.py"} < set(texts)
    found = {name: names for name, text in texts.items() if (names := names_below_the_root(text))}
    assert not found


def test_the_reference_has_every_public_name():
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: kromhc_hf\.(\S+)$", page, re.MULTILINE)
    assert page.count(":::") == len(documented)
    assert "`push_folder` is the earlier name" in page
    assert sorted([*documented, "push_folder"]) == sorted(kromhc_hf.__all__)


def test_messages_that_are_explained_are_messages_of_the_package():
    titles = re.findall(r"^## (.*)$", (DOCS / "messages.md").read_text(encoding="utf-8"), re.M)
    assert len(titles) > 5
    # Texts are broken over lines, and have values in them.
    source = "".join(p.read_text(encoding="utf-8") for p in sorted((PROJECT / "kromhc_hf").rglob("*.py")))
    joined = re.sub(r"\{[^{}]*\} ?", "", re.sub(r'"\s*\n\s*f?"', "", source))
    for title in titles:
        assert title in joined, title
