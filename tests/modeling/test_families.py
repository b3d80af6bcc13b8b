"""The table of families: complete, true to the installed transformers, and the one that the README shows."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support.rows import proposal
from support.tiny import configurations, make_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from kromhc_hf import (
    KromHCConfig,
    apply_hyper_connections,
    composite_model_types,
    has_hyper_connections,
    supported_model_types,
)
from kromhc_hf.families_table import (
    BEGIN,
    COUNTS,
    END,
    describe,
    families_counts,
    families_markdown,
    families_table,
    write_families,
)
from kromhc_hf.modeling.families import COMPOSITE, INSIDE, REFUSED, ROWS, SUPPORTED
from kromhc_hf.modeling.layer_spec import layer_kinds
from kromhc_hf.modeling.model_types import PREFIX
from kromhc_hf.modeling.releases import NEWEST, release


ROOT = Path(__file__).resolve().parents[2]


def test_every_generative_model_type_of_transformers_is_in_the_table_or_refused():
    """On the newest release that the tests have seen; what a newer one adds is reported, with the row that fits it."""
    # Ours are among them once a test has made their classes.
    native = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not name.startswith(PREFIX)]
    causal = {CONFIG_MAPPING[name].model_type for name in native}
    several = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.keys() | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()
    several = {name for name in several if not name.startswith(PREFIX)}
    tables = [*SUPPORTED, *COMPOSITE, *INSIDE, *REFUSED]
    assert len(tables) == len(set(tables))
    unknown = sorted(causal - SUPPORTED.keys() - COMPOSITE.keys() - REFUSED.keys())
    unknown_composite = sorted(several - SUPPORTED.keys() - COMPOSITE.keys() - REFUSED.keys() - causal)
    if release() == NEWEST:
        assert SUPPORTED.keys() <= causal
        assert COMPOSITE.keys() <= several
        assert REFUSED.keys() <= causal | several
        assert not unknown, [f"{name}: {proposal(name)}" for name in unknown]
        assert not unknown_composite, "decide about them: a text model in COMPOSITE, or a reason in REFUSED"
    for name in unknown:
        warnings.warn(f"transformers has a new model type {name}: {proposal(name)}", stacklevel=1)


def test_a_model_type_without_a_row_is_reported_with_the_one_that_fits(monkeypatch):
    row = SUPPORTED["gemma2"]
    monkeypatch.delitem(SUPPORTED, "gemma2")
    assert "gemma3_text" in SUPPORTED
    assert proposal("gemma2") == "the row of gemma3_text fits it, bitwise"
    assert SUPPORTED["gemma3_text"] == row
    monkeypatch.delitem(REFUSED, "minimax")
    assert proposal("minimax").startswith("it fits no row that there is")
    assert not {"gemma2", "minimax"} & ROWS.keys()
    assert proposal("nothing").startswith("no tiny model of it can be made (KeyError")


def test_every_text_model_inside_has_a_row():
    found = {name: CONFIG_MAPPING[name]().get_text_config().model_type for name in composite_model_types()}
    assert found == {name: COMPOSITE[name] for name in found}
    assert set(COMPOSITE.values()) <= ROWS.keys()
    assert INSIDE.keys() <= set(COMPOSITE.values())


def test_at_least_ninety_model_types_and_seventy_of_several_modalities():
    assert len(supported_model_types()) >= 90
    assert len(composite_model_types()) >= 70


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_with_the_reason(model_type):
    class Config:
        pass

    Config.model_type = model_type
    with pytest.raises(ValueError, match="is not supported") as error:
        KromHCConfig(backbone_config=Config())
    assert REFUSED[model_type] in str(error.value)


def test_unknown_family_names_the_ways_on():
    class Config:
        model_type = "gpt9"

    with pytest.raises(ValueError, match="supported families; got 'gpt9'. .*kromhc families.* register_family"):
        KromHCConfig(backbone_config=Config())


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("opt", {"do_layer_norm_before": False, "ffn_dim": 48, "word_embed_proj_dim": 32}, "OPT-350m"),
        ("opt", {"layerdrop": 0.1, "ffn_dim": 48, "word_embed_proj_dim": 32}, "layerdrop=0"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=False"),
        ("gpt2", {"add_cross_attention": True}, "without cross-attention"),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
            "enable_moe_block=False",
        ),
    ],
    ids=["opt-post-norm", "opt-layerdrop", "bloom-post-norm", "gpt2-cross-attention", "gemma4-moe"],
)
def test_refused_configurations(model_type, options, message):
    config = configurations(model_type)[-1]
    for name, value in options.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        apply_hyper_connections(model)
    assert not has_hyper_connections(model)
    assert list(model.state_dict()) == keys


def test_hybrids_have_layers_of_both_kinds():
    """The tiny configurations must reach every specification of a row with several."""
    for model_type in supported_model_types():
        row = SUPPORTED[model_type]
        models = [apply_hyper_connections(make_model(config)) for config in configurations(model_type)]
        found = {type(layer).spec for model in models for layer in model.modules() if hasattr(layer, "hc_layer_index")}
        assert found == set(layer_kinds(row)), model_type


def test_a_layer_with_more_weights_than_its_row_is_refused():
    model = make_model(configurations("llama")[0])
    model.model.layers[1].gate = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"layer 1 \(LlamaDecoderLayer\) must have no weights beyond .*'gate'"):
        apply_hyper_connections(model)
    assert not has_hyper_connections(model)


def test_a_hybrid_layer_that_fits_nothing_says_what_was_tried():
    model = make_model(configurations("qwen3_next")[0])
    del model.model.layers[2].linear_attn
    with pytest.raises(
        ValueError, match=r"layer 2 .*'linear_attn'; got None; or else it must have a module 'self_attn'"
    ):
        apply_hyper_connections(model)


def test_layers_read_by_no_name_of_a_family():
    """Rows are data: outside of families.py nothing may compare with the name of a family."""
    for file in (ROOT / "kromhc_hf").rglob("*.py"):
        if file.name == "families.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            for part in ast.walk(node) if isinstance(node, ast.Compare | ast.If | ast.IfExp) else ():
                if isinstance(part, ast.Constant) and isinstance(node, ast.Compare):
                    assert part.value not in ROWS | COMPOSITE, f"{file.name}:{part.lineno} compares with {part.value!r}"


def test_table_rows():
    rows = {row.model_type: row for row in families_table()}
    assert list(rows)[: len(supported_model_types())] == list(supported_model_types())
    assert rows["llama"].description == "self_attn(input_layernorm(x)); mlp(post_attention_layernorm(x))"
    assert rows["llama"].exactness == "bitwise equal"
    assert rows["cohere"].exactness == "equal up to the rounding of one sum"
    assert rows["granitemoe"].description.startswith("residual_multiplier * self_attn(input_layernorm(x)); ")
    assert rows["gemma3"].supported
    assert rows["gemma3"].text_model == "gemma3_text"
    assert rows["gemma3"].description == describe(SUPPORTED["gemma3_text"])
    assert not rows["zamba"].supported
    assert rows["zamba"].description == REFUSED["zamba"]
    assert describe(SUPPORTED["phi"]) == (
        "resid_dropout(self_attn(input_layernorm(x))) + resid_dropout(mlp(input_layernorm(x)))"
    )
    assert len(describe(SUPPORTED["lfm2"]).splitlines()) == 2


def test_the_table_has_what_the_installed_release_has_and_the_readme_all(monkeypatch):
    monkeypatch.delitem(CONFIG_MAPPING_NAMES, "lfm2")
    assert "lfm2" not in {row.model_type for row in families_table()}
    assert " lfm2," in families_markdown()


def test_pages_show_the_table_and_its_counts():
    run = "run: python -m kromhc_hf.families_table docs/models.md README.md"
    for name, (begin, end), text in (
        ("docs/models.md", (BEGIN, END), families_markdown()),
        ("README.md", COUNTS, families_counts()),
    ):
        shown = (ROOT / name).read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
        assert shown == f"\n{text}\n", run


def test_the_command_writes_the_table(tmp_path):
    page, readme = tmp_path / "models.md", tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    readme.write_text("\n".join(COUNTS))
    subprocess.run([sys.executable, "-m", "kromhc_hf.families_table", str(page), str(readme)], check=True, cwd=ROOT)
    assert page.read_text() == f"before\n{BEGIN}\n{families_markdown()}\n{END}\nafter\n"
    assert readme.read_text() == f"{COUNTS[0]}\n{families_counts()}\n{COUNTS[1]}"


def test_a_file_without_markers_is_refused(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("no markers")
    with pytest.raises(ValueError, match="must have the markers"):
        write_families(file)
    assert file.read_text() == "no markers"
