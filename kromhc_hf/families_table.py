"""The table of supported and refused model types, rendered from the same data that the models are built from.

`python -m kromhc_hf.families_table docs/models.md README.md` writes it between the markers of a page, and the counts
between those of another.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from .modeling.families import COMPOSITE, REFUSED, ROWS, SUPPORTED
from .modeling.layer_spec import Row, Step, Sublayer, layer_kinds
from .modeling.outside_families import REGISTERED
from .modeling.releases import NEWEST, has_family, numbered


BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
COUNTS = "<!-- counts:begin -->", "<!-- counts:end -->"
EXACT = "bitwise equal"
REORDERED = "equal up to the rounding of one sum"


class FamilyRow(NamedTuple):
    """One model type: what its layers are, or why it is refused."""

    model_type: str
    supported: bool
    description: str  # the pattern of its residual steps, or the reason
    exactness: str  # of a freshly converted model against the original; empty if refused
    text_model: str = ""  # of a model of several modalities, the model type of the text model inside


def families_table() -> list[FamilyRow]:
    """One row per model type: causal ones, those of several modalities, refused ones, then what was registered.

    Those of the installed transformers; each part is in alphabetical order.
    """
    found = [row for row in _all_families() if has_family(row.model_type) and row.model_type not in REGISTERED]
    for name, family in sorted(REGISTERED.items()):
        found.append(FamilyRow(name, True, describe(family.row), "by its registered row"))
    return found


def _all_families() -> list[FamilyRow]:
    supported = [FamilyRow(name, True, describe(row), exactness(row)) for name, row in sorted(SUPPORTED.items())]
    supported += [
        FamilyRow(name, True, describe(ROWS[text]), exactness(ROWS[text]), text)
        for name, text in sorted(COMPOSITE.items())
    ]
    return supported + [FamilyRow(name, False, reason, "") for name, reason in sorted(REFUSED.items())]


def exactness(row: Row) -> str:
    """How the logits of a converted model that was not trained compare with those of its base."""
    return EXACT if all(spec.exact for spec in layer_kinds(row)) else REORDERED


def families_markdown() -> str:
    """The table in Markdown: supported model types by exactness or text model, refused ones by reason."""
    rows = _all_families()
    text = [row for row in rows if row.supported and not row.text_model]
    composite = [row for row in rows if row.text_model]
    reordered = ", ".join(row.model_type for row in composite if row.exactness == REORDERED)
    refused = [row for row in rows if not row.supported]
    lines = [f"{len(text)} model types of `AutoModelForCausalLM` in transformers {numbered(NEWEST)} are supported:", ""]
    lines += ["| logits after conversion | model types |", "|---|---|", *_grouped(text, "exactness")]
    auto = "`AutoModelForImageTextToText` and `AutoModelForMultimodalLM`"
    lines += ["", f"So are {len(composite)} of {auto}, whose text model gets the"]
    lines += [f"streams; logits are {EXACT}, or {REORDERED} ({reordered}):", ""]
    lines += ["| text model, by default | model types |", "|---|---|", *_grouped(composite, "text_model")]
    lines += ["", f"{len(refused)} are refused:", ""]
    lines += ["| reason | model types |", "|---|---|", *_grouped(refused, "description")]
    return "\n".join(lines)


def put_between(file: Path, first: str, last: str, text: str) -> None:
    """Puts a text between two markers of a Markdown file.

    Raises:
        ValueError: if the file does not have the two markers.
    """
    before, begin, rest = file.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{file} must have the markers {first} and {last}; add them where the table belongs.")
    file.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8")


def write_families(file: Path) -> None:
    """Puts the table between the markers of a Markdown file.

    Raises:
        ValueError: if the file does not have the two markers.
    """
    put_between(file, BEGIN, END, families_markdown())


def families_counts() -> str:
    """How many model types are supported, in a sentence."""
    rows = _all_families()
    text, composite = ([row for row in rows if row.supported and bool(row.text_model) == part] for part in (0, 1))
    return (
        f"{len(text)} model types of `AutoModelForCausalLM` in transformers {numbered(NEWEST)}, and "
        f"{len(composite)} of several modalities around such a text model."
    )


def write_counts(file: Path) -> None:
    """Puts the sentence between its markers of a Markdown file.

    Raises:
        ValueError: if the file does not have the two markers.
    """
    put_between(file, *COUNTS, families_counts())


def describe(row: Row) -> str:
    """The residual steps of a family: `self_attn(input_layernorm(x)); mlp(post_attention_layernorm(x))`.

    One line for each kind of layer that it has.
    """
    return "\n".join(dict.fromkeys("; ".join(map(_describe_step, spec.steps)) for spec in layer_kinds(row)))


def _describe_step(step: Step) -> str:
    text = " + ".join(map(_describe_sublayer, step.sublayers))
    for name in step.post:
        text = f"{name}({text})"
    summed = step.scale and len(step.sublayers) > 1 and not step.post
    return text if step.scale is None else f"{step.scale} * ({text})" if summed else f"{step.scale} * {text}"


def _describe_sublayer(sublayer: Sublayer) -> str:
    text = "x" if sublayer.pre is None else f"{sublayer.pre}(x)"
    if sublayer.input_scale is not None:
        text = f"{sublayer.input_scale} * {text}"
    for name in sublayer.modules:
        text = f"{name}({text})"
    if sublayer.times is not None:
        text = f"{sublayer.times} * {text}"
    for name in sublayer.post:
        text = f"{name}({text})"
    return text if sublayer.scale is None else f"{sublayer.scale} * {text}"


def _grouped(rows: list[FamilyRow], field: str) -> list[str]:
    """One Markdown row per value of a field, the most frequent first."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(getattr(row, field), []).append(row.model_type)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [f"| {key} | {', '.join(names)} |" for key, names in ordered]


if __name__ == "__main__":
    for number, name in enumerate(sys.argv[1:]):
        (write_families, write_counts)[number](Path(name))
