"""Rows in TOML files: the same words as in Python, and nothing else."""

import json
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from support.outside import AMBER, BASALT

from kromhc_hf.command_options import run_family_file
from kromhc_hf.modeling.families import ROWS
from kromhc_hf.modeling.layer_spec import layer_kinds
from kromhc_hf.modeling.outside_families import REGISTERED, OutsideFamily


PAGE = Path(__file__).parents[1] / "docs/how-to/outside-families.md"
needs_tomllib = pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")


pytestmark = pytest.mark.usefixtures("nothing_registered")


@pytest.fixture
def register(tmp_path):
    def write_and_register(text: str):
        path = tmp_path / "family.toml"
        path.write_text(text)
        run_family_file(path)
        (family,) = REGISTERED.values()
        return family

    return write_and_register


TWO_KINDS = """
model_type = "both"
[[row]]
sequential = [
    { module = "attention", pre = "first_norm" },
    { module = "feed_forward", pre = "second_norm" },
]
[[row]]
block = [{ module = "attn", pre = "ln", scale = "attn_scale" }, { module = "fc", pre = "ln", scale = "fc_scale" }]
layers = "blocks"
"""


@needs_tomllib
def test_the_words_are_those_of_python(register):
    assert register(TWO_KINDS) == OutsideFamily("both", (AMBER, BASALT))


@needs_tomllib
def test_the_example_of_the_page_is_a_row(register):
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert register(example) == OutsideFamily("amber", AMBER, "AmberLayer")


@needs_tomllib
def test_a_registered_row_is_in_the_table(kromhc, tmp_path):
    (tmp_path / "family.toml").write_text(TWO_KINDS)
    for chosen in ([], ["both"]):
        code, out, _ = kromhc("families", *chosen, "--family", tmp_path / "family.toml", "--json")
        assert code == 0
        assert {row["model_type"]: row["exactness"] for row in json.loads(out)}["both"] == "by its registered row"


def spelled(value) -> str:
    """A part of a row as TOML."""
    if is_dataclass(value):
        given = ((field.name, getattr(value, field.name)) for field in fields(value) if field.name != "derived")
        return f"{{{', '.join(f'{name} = {spelled(part)}' for name, part in given if part is not None)}}}"
    return f"[{', '.join(map(spelled, value))}]" if isinstance(value, tuple) else json.dumps(value)


@needs_tomllib
@pytest.mark.parametrize("model_type", ROWS)
def test_every_row_of_the_table_can_be_said(register, model_type):
    kinds = layer_kinds(ROWS[model_type])
    family = register(f'model_type = "mine"\nlayer_class = "Mine"\nrow = {spelled(kinds)}')
    assert layer_kinds(family.row) == kinds
    assert family.layer_class == "Mine"


@needs_tomllib
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ", r"family\.toml must be a TOML file"),
        ("row = []", r"family\.toml must say model_type; it has row"),
        ('model_type = "a"\nrow = "s"', r"family\.toml\.row must be an array; got 's'"),
        ('model_type = "llama"\n[[row]]\nblock = [{ module = "m" }]', "native class is supported"),
        ("block = []", r"\[\[row\]\] 1\.block must have .* at least one; got 0"),
        ('sequential = [{ module = "m" }]', "two, attention and feed-forward; got 1"),
        ('block = [{ module = "m", norm = "n" }]', r"block\[0\] must have no names but module, pre.*; got 'norm'"),
        ('block = [{ pre = "n" }]', r"block\[0\] must say all of a Sublayer.*'module'"),
        ('block = ["m"]', r"block\[0\] must be a table with module.*; got 'm'"),
        ('block = [{ module = "m", attention = 1 }]', r"block\[0\]\.attention must be true or false; got 1"),
        ('block = [{ module = "m", scale = ["s"] }]', r"block\[0\]\.scale must be a string; got \['s'\]"),
        ('block = [{ module = "m", renames = [["x"]] }]', r"renames\[0\] must be an array of 2"),
        ('block = [{ module = "m" }]\nderived = true', "must have no names but block, post, layers.*; got 'derived'"),
        ('block = [{ module = "m" }]\nsteps = []', "one of sequential, block and steps; it has block, steps"),
        ("steps = []", "at least one step"),
        ('steps = [{ name = "attn", sublayers = [{ module = "m" }] }]', "ends in '_hc'.*; got 'attn'"),
    ],
)
def test_what_is_no_row_is_refused_with_its_place(register, text, message):
    if ("row" not in text and " = [" in text) or "steps" in text:
        text = f'model_type = "mine"\n[[row]]\n{text}'
    with pytest.raises(ValueError, match=message):
        register(text)
    assert not REGISTERED


def test_an_older_python_is_told_what_to_do(register, monkeypatch):
    monkeypatch.setitem(sys.modules, "tomllib", None)
    with pytest.raises(ValueError, match=r"needs Python 3\.11 or newer .* Write the row into a Python file"):
        register(TWO_KINDS)
