"""The matrices of many branches: how pictures fall into rows, what a layer's picture shows, which branch is marked."""

import math
from collections import Counter

import pytest
import torch
from support.browser import measure
from support.handmade import IDENTITY, SWAP, UNIFORM, handmade

from kromhc_hf.inspection.page import CELLS, Picture, Section, drawn, most_columns, page, section_html
from kromhc_hf.inspection.report_sections import sections
from kromhc_hf.inspection.small_multiples import MOST_LARGE, branch_pictures, odd_ones_out, said_of_odd_ones


MIXED = 0.9 * IDENTITY + 0.1 * UNIFORM


def by_branch(*matrices):
    return {name: record.h_res[0, 0] for name, record in handmade(*matrices).records.items()}


def test_the_odd_one_is_named_with_its_distance():
    # SWAP takes two of four streams from elsewhere than the identity does.
    matrices = by_branch(*[IDENTITY] * 5, SWAP, *[IDENTITY] * 2)
    assert odd_ones_out(matrices) == {"layers.2.ffn_hc": 0.5}
    assert "Framed, since unlike the others: 2 ffn (50.0%), in brackets" in said_of_odd_ones(odd_ones_out(matrices))
    assert odd_ones_out(by_branch(*[IDENTITY] * 6)) == {}
    # Of branches that all differ, none is odd.
    assert odd_ones_out(by_branch(IDENTITY, SWAP, IDENTITY, SWAP)) == {}
    assert said_of_odd_ones({}) == ""
    many = said_of_odd_ones({f"layers.{i}.attn_hc": 0.5 for i in range(9)})
    assert "3 attn (50.0%) and 5 more" in many


def test_many_branches_are_shown_layer_by_layer():
    count = MOST_LARGE + 2
    inspection = handmade(*[IDENTITY] * 4, SWAP, *[IDENTITY] * (count - 5))
    mixing = sections(inspection)[0]
    assert "Framed, since unlike the others: 2 attn" in mixing.text
    scale, *layers, curve = mixing.pictures
    assert (scale.kind, curve.kind) == ("scale", "large")
    assert [(p.kind, p.label) for p in layers[:2]] == [
        ("tiny", "mean H_res, layer 0: attn, ffn"),
        ("tiny", "mean H_res, layer 1: attn, ffn"),
    ]
    figures = [picture.draw() for picture in layers]
    panels = [panel for figure in figures for panel in figure.axes]
    shown = [panel.collections[0].get_array().tolist() for panel in panels]
    assert shown == [m.tolist() for m in by_branch(*[IDENTITY] * 4, SWAP, *[IDENTITY] * (count - 5)).values()]
    assert [panel.get_ylabel() for panel in panels] == ["attn", "ffn"] * (count // 2)
    assert [figure.axes[0].get_title() for figure in figures] == [str(i) for i in range(count // 2)]
    framed = [panel.spines["left"].get_visible() for panel in panels]
    assert [i for i, marked in enumerate(framed) if marked] == [4]
    # Few branches keep axes and numbers of their own, and the odd one is framed as well.
    few = branch_pictures("mean", by_branch(IDENTITY, SWAP), (0, 1), "cividis", {"layers.0.ffn_hc": 0.5})
    assert [p.kind for p in few] == ["small", "small"]
    assert [p.draw().axes[0].spines["left"].get_visible() for p in few] == [False, True]


@pytest.mark.parametrize("width", [1280, 700, 400])
def test_no_picture_is_alone_in_its_row(tmp_path, width):
    counts = {"small": range(1, 17), "tiny": (9, 13, 25, 30, 37, 60, 61)}
    box = '<figure><svg viewBox="0 0 10 10" aria-label="{}"></svg></figure>'
    body = ""
    for kind, numbers in counts.items():
        for count in numbers:
            cell = Picture(kind, "", lambda: None), box.format(f"{kind} {count}")
            body += section_html(Section("", "", []), [cell] * count)
    # Real ones below, whose letters must be readable.
    real = branch_pictures("real", by_branch(*[MIXED] * 18), (0, 1), "cividis", {})
    path = tmp_path / "rows.html"
    path.write_text(page("rows", body + drawn([Section("", "", real)]), {}), encoding="utf-8")
    layout = measure(path, width)
    assert layout["width"] <= width
    rows: dict[str, Counter] = {}
    for figure in layout["figures"]:
        label, (left, top, wide, _) = figure["label"], figure["box"]
        if label.startswith("real"):
            assert figure["smallest"] >= 8, figure
            assert figure["cut"] == [], figure
        else:
            rows.setdefault(label, Counter())[round(top)] += 1
            assert left + wide <= width
    assert len(rows) == sum(map(len, counts.values()))
    for label, lengths in rows.items():
        kind, count = label.split()
        fits = most_columns(CELLS[kind], min(width, 1200))
        assert max(lengths.values()) <= fits, label
        # As few rows as there can be.
        assert len(lengths) == math.ceil(int(count) / fits), label
        if len(lengths) > 1 and max(lengths.values()) > 2:
            assert min(lengths.values()) > 1, (label, lengths)


def test_matrices_of_sixteen_streams_are_shown_whole():
    matrix = torch.rand(16, 16)
    (picture, *_) = branch_pictures("m", {f"layers.{i}.block_hc": matrix for i in range(20)}, (0, 1), "cividis", {})
    (panel,) = picture.draw().axes
    assert panel.collections[0].get_array().shape == (16, 16)
    assert picture.label == "m, layer 0: block"
