"""Models that have several streams from birth: what is recorded, held against their own layers."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from kromhc_hf import inspect_model, record_mappings
from kromhc_hf.inspection.native_streams import NATIVE_STREAMS, native_branches
from kromhc_hf.inspection.tables import total_rows
from kromhc_hf.modeling.releases import has_family


COMMON = {
    **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 2}
TINY = {
    "deepseek_v4": {
        **{**COMMON, **EXPERTS, **INDEX, "n_routed_experts": 4, "n_shared_experts": 1, "hc_mult": 3},
        **{"num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8},
    },
    "hy_v4": {
        **{**COMMON, **EXPERTS, **INDEX, **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "hc_mult": 3},
        **{"qk_rope_head_dim": 8, "intermediate_size": 32},
    },
    "glm5_next": {
        "text_config": {
            **{**COMMON, **EXPERTS, **INDEX, **LATENT, "n_routed_experts": 4, "n_shared_experts": 1, "hc_mult": 3},
            **{"num_hidden_layers": 4, "intermediate_size": 32, "linear_head_dim": 16, "linear_num_heads": 2},
            "index_kpool": 2,
        },
        "vision_config": {
            **{"depth": 1, "hidden_size": 16, "num_heads": 2, "image_size": 28, "out_hidden_size": 32},
            **{"intermediate_size": 16, "projection_intermediate_size": 16},
        },
    },
    "qwen4_exp_text": {
        **{**COMMON, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16, "hc_count": 3},
        **{"hc_lowrank": 8, "head_dim": 16, "num_key_value_heads": 2, "num_hidden_layers": 4},
        **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
        **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1},
        **{"indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2},
    },
}
PRESENT = [model_type for model_type in TINY if has_family(model_type)]
IDS = torch.arange(3, 15)[None]


def tiny(model_type: str):
    """A random model whose streams mix far from uniformly and unsymmetrically."""
    config = AutoConfig.for_model(model_type, **TINY[model_type])
    auto = AutoModelForImageTextToText if model_type == "glm5_next" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for module, _ in native_branches(model).values():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.5 if parameter.dim() < 2 else 0.2))
    return model


@pytest.fixture(scope="module", params=PRESENT)
def model(request):
    return tiny(request.param)


def decoder_layers(model):
    return [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]


def test_recorded_mappings_give_the_streams_of_the_next_branch(model):
    """`h_res` and `h_post` in our orientation, with what the branch put out, make what the next branch saw."""
    outputs = []
    layers = decoder_layers(model)
    kinds = [[getattr(layer, name, None) for name in ("self_attn", "linear_attn")] + [layer.mlp] for layer in layers]
    branches = [module for kind in kinds for module in kind if module is not None]
    hooks = [
        branch.register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for branch in branches
    ]
    with record_mappings(model, IDS) as records:
        pass
    for hook in hooks:
        hook.remove()
    assert list(records) == [f"layers.{i}.{kind}" for i in range(len(layers)) for kind in ("attn_hc", "ffn_hc")]
    assert len(outputs) == len(records)
    mixes = model.config.model_type in ("deepseek_v4", "glm5_next")
    first = records["layers.0.attn_hc"]
    for (here, after), output in zip(zip(list(records.values()), list(records.values())[1:]), outputs):
        n = here.streams.shape[2]
        assert here.h_pre.shape == here.h_post.shape == (1, 12, n)
        made = here.h_res @ here.streams + here.h_post[..., None] * output.unsqueeze(-2)
        # One product and sum of n terms in float32.
        torch.testing.assert_close(made, after.streams, rtol=1e-5, atol=1e-5)
        # From the second branch on streams differ, and a transposed matrix would be seen.
        if mixes and here is not first:
            transposed = made + (here.h_res.mT - here.h_res) @ here.streams
            assert (transposed - after.streams).abs().max() > 1e-3


def test_recording_changes_nothing_and_leaves_nothing(model):
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with record_mappings(model, max_tokens=5) as records:
            assert torch.equal(model(input_ids=IDS).logits, before)
    assert {record.h_res.shape[:2] for record in records.values()} == {(1, 5)}
    assert not any(module._forward_hooks for module in model.modules())


def test_the_inspection_says_what_it_shows(model):
    inspection = inspect_model(model, IDS)
    native = NATIVE_STREAMS[model.config.get_text_config().model_type]
    assert inspection.num_streams == 3
    assert (inspection.variant, inspection.said) == (native.variant, native.said)
    own = [
        p for layer in decoder_layers(model) for at in native.names.values() for p in getattr(layer, at).parameters()
    ]
    assert inspection.added_parameters == sum(p.numel() for p in own)
    error = inspection.total["doubly_stochastic_error"]
    assert (error == 0) if "not mixed" in native.said else error > 0
    assert dict(total_rows(inspection))["as shown here"] == native.said


def test_the_gated_read_is_shown_as_its_mean_over_channels():
    if "qwen4_exp_text" not in PRESENT:
        pytest.skip("this release of transformers does not have it")
    model = tiny("qwen4_exp_text")
    gates = []
    module = model.model.layers[1].mlp_hyper_connection
    handle = module.input_mix_weight_up.register_forward_hook(lambda m, a, out: gates.append(out.sigmoid()))
    with torch.no_grad():
        model(input_ids=IDS)
    handle.remove()
    with record_mappings(model, IDS) as records:
        record = records["layers.1.ffn_hc"]
    # Stream by stream in a loop; their read is a mean over streams, hence the 3.
    for stream, gate in enumerate(gates[0].chunk(3, -1)):
        torch.testing.assert_close(record.h_pre[..., stream], gate.mean(-1) / 3)


@pytest.mark.parametrize("model_type", PRESENT)
def test_weights_that_do_not_give_what_was_read_are_refused(model_type, monkeypatch):
    model = tiny(model_type)
    module = next(iter(native_branches(model).values()))[0]
    forward = module.forward

    def otherwise(streams):
        # As a release that divides what it reads would.
        return tuple(
            part / 2 if part.shape[-1] == 32 and part.shape != streams.shape else part for part in forward(streams)
        )

    monkeypatch.setattr(module, "forward", otherwise)
    with pytest.raises(ValueError, match="must give what it read"), record_mappings(model, IDS):
        pass


@pytest.mark.skipif("deepseek_v4" not in PRESENT, reason="this release of transformers does not have it")
def test_the_command_shows_a_checkpoint_with_streams_from_birth(kromhc, tmp_path):
    tiny("deepseek_v4").save_pretrained(tmp_path / "model")
    code, out, err = kromhc("inspect", tmp_path / "model", "--max-tokens", "8", "--output", tmp_path / "report")
    assert code == 0, err
    assert "mhc, from birth, 3 streams, 4 branches" in out
    assert "transpose of its own matrix" in " ".join(out.split())
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    numbers = json.loads(page.partition('id="numbers">')[2].partition("</script>")[0])
    assert numbers["model"]["said"] in page.partition("<script")[0]
