"""The report: its numbers, its pictures, what it is made of, and how a browser shows it."""

import json
import re
import time
from html.parser import HTMLParser

import pytest
import torch
from support.browser import DARK, measure, screenshot
from support.handmade import IDENTITY, SWAP, TOKENS, UNIFORM, N, handmade, record
from support.runs import retrofitted
from support.tiny import token_ids

from kromhc_hf import convert_checkpoint, inspect_model
from kromhc_hf.inspection.plots import depth_map_figure, token_map_figure, visible
from kromhc_hf.inspection.report import report_html, write_report
from kromhc_hf.inspection.report_sections import sections, weight_limits


def pictures(*inspections):
    """The drawn figures by the title of their section."""
    return {part.title: [(p.label, p.draw()) for p in part.pictures] for part in sections(*inspections)}


def matrix_of(figure) -> list[list[float]]:
    (mesh,) = figure.axes[0].collections
    return mesh.get_array().tolist()


def curves_of(figure) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}


def vary(inspection):
    """The same inspection with read and write weights that differ between tokens."""
    weights = torch.rand(1, len(TOKENS), N)
    records = {name: record(r.h_res[0, 0], weights) for name, r in inspection.records.items()}
    return handmade(*(r.h_res[0, 0] for r in records.values()), records=records)


def test_pictures_show_the_numbers_of_mappings_by_hand():
    inspection = handmade(IDENTITY, SWAP, UNIFORM)
    drawn = pictures(inspection)
    mixing, reading, products, sums, similarity, tokens = drawn.values()
    assert [matrix_of(figure) for _, figure in mixing[1:-1]] == [m.tolist() for m in (IDENTITY, SWAP, UNIFORM)]
    assert curves_of(mixing[-1][1]) == {"after": [0, 0.5, 0.75]}
    assert [matrix_of(figure) for _, figure in reading] == [[[1.0] * 3] * N] * 2
    # Forward up to branches 1 and 2 (SWAP, UNIFORM), backward down to branches 0 and 1 (UNIFORM both).
    shown = [matrix_of(figure) for _, figure in products[1:-1]]
    assert shown == [m.tolist() for m in (SWAP, UNIFORM, UNIFORM, UNIFORM)]
    gains = curves_of(products[-1][1])
    assert len(gains) == 4
    assert all(values == [1, 1, 1] for values in gains.values())
    assert curves_of(sums[0][1])["this model"] == [0, 0, 0]
    assert curves_of(similarity[0][1])["cosine"] == [0, 0, 0]
    assert curves_of(similarity[1][1])["after"] == pytest.approx([N] * 3, rel=1e-6)
    assert tokens == []


def test_two_checkpoints_are_compared():
    after, before = handmade(SWAP, UNIFORM), handmade(IDENTITY, IDENTITY)
    drawn = pictures(after, before)
    change = drawn["How the mixing has changed: after minus before"]
    assert [matrix_of(figure) for _, figure in change[1:]] == [(m - IDENTITY).tolist() for m in (SWAP, UNIFORM)]
    mass = curves_of(drawn["How the streams mix: H_res, after"][-1][1])
    assert mass == {"after": [0.5, 0.75], "before": [0, 0]}
    unequal = handmade(IDENTITY, IDENTITY, num_streams=2)
    assert not [title for title in pictures(after, unequal) if "changed" in title]


def test_every_axis_is_labelled():
    for title, drawn in pictures(vary(handmade(IDENTITY, SWAP)), handmade(UNIFORM, SWAP)).items():
        for label, figure in drawn:
            main, *scales = figure.axes
            labels = [main.get_xlabel(), main.get_ylabel()]
            # A colour scale alone has one axis.
            assert all(labels) or (label.startswith("colour scale") and any(labels)), (title, label)
            assert all(axis.get_xlabel() or axis.get_ylabel() for axis in scales), (title, label)


def test_tokens_are_under_their_columns():
    inspection = vary(handmade(IDENTITY, SWAP))
    drawn = pictures(inspection)["Token by token"]
    # Read weights differ between tokens, the others do not.
    ((label, figure),) = drawn
    assert label.startswith("H_pre")
    wanted = [branch["token_variation"]["h_pre"] for branch in inspection.to_dict()["branches"].values()]
    assert figure.axes[0].images[0].get_array().tolist() == wanted
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [visible(token) for token in TOKENS]
    assert [visible(t) for t in ("\n", " ", "\t", "\x00", "a" * 13)] == ["⏎", "␣", "⇥", "�", "a" * 11 + "…"]


def test_colours_for_weights():
    assert weight_limits([IDENTITY, UNIFORM])[0] == (0, 1)
    assert weight_limits([IDENTITY, -3 * UNIFORM])[0] == (-1, 1)
    assert weight_limits([-2.5 * IDENTITY])[0] == (-2.5, 2.5)


class Elements(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_the_page_needs_nothing_else_and_is_well_formed():
    inspection = vary(handmade(IDENTITY, SWAP, name='<b>"a" & b</b>'))
    after = handmade(SWAP, SWAP, name="</script><script>alert(1)</script>", records=inspection.records)
    page = report_html(after, inspection)
    assert "http" not in page
    tags = Elements(page).tags
    for tag, attributes in tags:
        assert tag not in ("b", "iframe", "img", "object"), tag
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), attributes
    assert [a for tag, a in tags if tag == "script"] == [{"type": "application/json", "id": "numbers"}]
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    count = sum(len(part.pictures) for part in sections(after, inspection))
    assert sum(tag == "svg" for tag, _ in tags) == sum(tag == "figure" for tag, _ in tags) == count
    data = page.partition('id="numbers">')[2].partition("</script>")[0]
    assert json.loads(data) == {"model": after.to_dict(), "before": inspection.to_dict()}
    assert report_html(after, inspection) == page


def test_deep_models_and_many_streams_are_drawn():
    n, depth = 16, 70
    branches = [f"layers.{i}.block_hc" for i in range(depth)]
    figure = depth_map_figure(torch.rand(depth, n), branches, "weight", (0, 1))
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == [f"{i} block" for i in range(0, 70, 5)]
    figure = token_map_figure(torch.rand(depth, 3), branches, ["a", "b", "c"], "weight")
    assert len(figure.axes[0].get_yticklabels()) == 24


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with every kind of picture."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("report") / "report.html"
    done = []
    mixed = 0.8 * IDENTITY + 0.2 * UNIFORM
    after = vary(handmade(*[mixed, 0.9 * mixed + 0.1 * SWAP] * 3))
    write_report(after, path, handmade(*[IDENTITY, mixed] * 3), progress=lambda *step: done.append(step))
    assert done[-1] == (len(done), len(done))
    return path


@pytest.mark.parametrize("flags", [(), (DARK,)], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_every_figure(page, tmp_path, width, flags):
    from matplotlib.image import imread

    layout = measure(page, width, *flags)
    assert layout["console"] == []
    assert layout["requests"] == []
    assert layout["window"] == width
    # Nothing sticks out to the side.
    assert layout["width"] <= width
    picture = tmp_path / "report.png"
    screenshot(page, width, layout["height"], picture, *flags)
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (layout["height"], width)
    # Without a theme the background is white, with the dark one nearly black.
    assert (pixels[0, 0].mean() < 0.2) == bool(flags)
    assert len(layout["figures"]) > 30
    for figure in layout["figures"]:
        left, top, figure_width, height = map(round, figure["box"])
        assert figure_width > 100, figure
        assert height > 40, figure
        assert left >= 0, figure
        assert figure["scrolls"] or left + figure_width <= width, figure
        assert figure["cut"] == [], figure
        assert figure["smallest"] >= 8, figure
        seen = pixels[top : top + height, left : min(left + figure_width, width)]
        # Drawn: text and picture stand out from the card in light and in dark.
        assert seen.max() - seen.min() > 0.5, figure


def test_static_mappings_without_a_constraint_are_drawn():
    model = retrofitted(variant="hc", dynamic=False)
    page = report_html(inspect_model(model, token_ids(model.config, batch=1)))
    assert "The mappings of this model are static" in page


def test_a_real_checkpoint_takes_seconds_and_shows_progress(kromhc, shared, tmp_path):
    convert_checkpoint(shared / "models" / "stories15M", tmp_path / "converted")
    start = time.process_time()
    code, out, err = kromhc("inspect", tmp_path / "converted", "--output", tmp_path / "report")
    # Time of the processor, since wall time is that of everything else on the machine too.
    assert time.process_time() - start < 30
    assert code == 0
    assert "138,396" in out
    assert "drawing" in err
    assert "29/29" in err
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="numbers">')[2].partition("</script>")[0])
    assert data["model"]["total"]["stream_spread"] == 0
    assert data["model"]["tokens"][:3] == ["<s>", "Once", "upon"]
