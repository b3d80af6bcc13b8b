"""Layers of a live model are dropped, moved, copied and replaced: as if hyper-connections had come afterwards."""

import copy

import pytest
import torch
from support.adapters import adapter_config, perturb_hyper_connections
from support.connected import connected, same_gradients_checkpointed
from support.tiny import configurations, make_model, separate_streams, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

from kromhc_hf import apply_hyper_connections, remove_hyper_connections
from kromhc_hf.modeling.connection_plan import find_decoder
from kromhc_hf.modeling.decoder_layer import HyperConnectedLayer


# Which of the first three layers stand where in the end.
ORDERS = {
    "first-dropped": (1, 2),
    "middle-dropped": (0, 2),
    "last-dropped": (0, 1),
    "swapped": (2, 1, 0),
    "copied": (0, 0, 1, 2, 2),
    "one": (1,),
}
FAMILIES = ("llama", "gpt2", "opt", "gemma2", "mamba")


def family_model(model_type: str):
    return make_model(configurations(model_type)[0])


def reorder(model, order: tuple[int, ...], told: bool = True) -> None:
    """Puts the layers in this order, copies where one comes again, and says so in the configuration."""
    owners, present, path, _ = find_decoder(model)
    parent, _, name = path.rpartition(".")
    layers = [copy.deepcopy(present[i]) if i in order[:place] else present[i] for place, i in enumerate(order)]
    setattr(owners[-1].get_submodule(parent), name, nn.ModuleList(layers))
    if told:
        tell(model, len(layers))


def tell(model, number: int) -> None:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.num_hidden_layers = number
            if "layer_types" in vars(module.config):
                module.config.layer_types = (module.config.layer_types * 2)[:number]


def reordered_before(model, order: tuple[int, ...], **options):
    """The oracle: the plain layers are put in order first, and get the same hyper-connections then."""
    own = [layer.state_dict() for layer in find_decoder(model).layers]
    plain = remove_hyper_connections(copy.deepcopy(model))
    reorder(plain, order)
    apply_hyper_connections(plain, **options)
    for i, layer in zip(order, find_decoder(plain).layers):
        layer.load_state_dict(own[i])
    return plain


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(model.config), use_cache=False).logits


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_layers_in_another_order(model_type, order, tmp_path):
    model = apply_hyper_connections(family_model(model_type), 4)
    separate_streams(model)
    expected = logits(reordered_before(model, order, num_streams=4))
    assert logits(model).shape == expected.shape
    reorder(model, order)
    assert torch.equal(logits(model), expected)
    states = model(input_ids=token_ids(model.config), use_cache=False, output_hidden_states=True).hidden_states
    assert [state.dim() for state in states] == [3] * (len(order) + 1)
    if model_type != "gemma2":  # whose layers differ, and are made anew by their place
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("readout", ["mean", "norm_sum"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_fewer_layers_than_the_configuration_says(model_type, readout, tmp_path):
    options = {"num_streams": 2, "readout": readout, "init": "paper"}
    model = apply_hyper_connections(family_model(model_type), **options)
    separate_streams(model)
    expected = logits(reordered_before(model, (0, 2), **options))
    reorder(model, (0, 2), told=False)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"num_hidden_layers = 3 decoder layers.*; got 2\. Set config.num_hidden"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_layers_than_the_configuration_says(tmp_path):
    model = connected(0.3).eval()
    expected = logits(reordered_before(model, (0, 1, 1), num_streams=4))
    reorder(model, (0, 1, 1, 2), told=False)
    assert torch.equal(logits(model), expected)  # llama runs as many as the configuration says
    with pytest.raises(ValueError, match="num_hidden_layers = 3 decoder layers.*; got 4"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "mamba"])
def test_families_that_run_all_layers_whatever_the_configuration_says(model_type):
    model = apply_hyper_connections(family_model(model_type), 4)
    separate_streams(model)
    expected = logits(model)
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match=r"layer 2 .*must be given the streams.*num_hidden_layers \(now 2\)"):
        logits(model)
    model.config.num_hidden_layers = 3
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("options", [{"readout": "attention"}, {"stream_embedding": True}], ids=["readout", "expand"])
def test_learned_ends_stay_at_the_ends(options):
    name, home, others = ("readout_hc", 2, (0, 1)) if "readout" in options else ("expand_hc", 0, (1, 2))
    model = connected(0.3, **options).eval()
    expected = logits(reordered_before(model, (0, 2), **options)) if name == "readout_hc" else None
    for order in (others, (2, 1, 0), (0, 0, 1, 2, 2)):
        changed = copy.deepcopy(model)
        reorder(changed, order)
        before = [vars(layer)["hc_layer_index"] for layer in changed.model.layers]
        with pytest.raises(ValueError, match=rf"must have the learned '{name}'.*Hand the module over"):
            logits(changed)
        assert [layer.hc_layer_index for layer in changed.model.layers] == before
    if expected is not None:
        reorder(model, (0, 2))
        assert torch.equal(logits(model), expected)
    # As the message says.
    last_two = connected(0.3, **options).eval()
    ends = getattr(last_two.model.layers[home], name)
    reorder(last_two, others)
    setattr(last_two.model.layers[0 if name == "expand_hc" else -1], name, ends)
    assert logits(last_two).dim() == 3


def test_plain_layers_are_refused_and_foreign_ones_with_other_options():
    model, plain = connected(0.3), family_model("llama")
    expected = logits(model)
    first, middle, last = model.model.layers
    model.model.layers = nn.ModuleList([first, middle, plain.model.layers[1], last])
    for number in (3, 4):
        model.config.num_hidden_layers = number
        with pytest.raises(ValueError, match="same options, StreamOptions.*; layer 2 has none"):
            logits(model)
    model.config.num_hidden_layers = 3
    for stranger, found in (
        (plain.model.layers[0], "layer 0 has none"),
        (connected(num_streams=2).model.layers[0], "num_streams=2"),
        (connected(variant="mhc").model.layers[0], "variant='mhc'"),
    ):
        model.model.layers = nn.ModuleList([stranger, middle, last])
        with pytest.raises(ValueError, match=rf"of the same options.*{found}"):
            logits(model)
    model.model.layers = nn.ModuleList([first, middle, middle])
    with pytest.raises(ValueError, match="a module of its own.*copy.deepcopy"):
        logits(model)
    model.model.layers = nn.ModuleList([first, middle, last])
    assert torch.equal(logits(model), expected)


def test_pipeline_stages_are_refused():
    """As vLLM leaves a model on its first stage: what stands for the other layers is empty."""
    model = connected()
    model.model.layers[-1] = nn.Identity()
    for start in (model.eval, lambda: nn.Sequential(model.model).eval(), lambda: logits(model)):
        with pytest.raises(ValueError, match=r"must be in one pipeline stage.* layer 2 is an empty Identity"):
            start()


def test_a_layer_of_another_model_with_the_same_options(tmp_path):
    model, donor = connected(0.3), connected(0.6)
    model.model.layers[2] = donor.model.layers[0]
    result = logits(model)
    assert result.dim() == 3
    assert model.model.layers[2].hc_config is model.config
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), result)


def test_a_connected_layer_in_a_plain_model():
    plain, model = family_model("llama"), connected()
    for position in (1, 2):
        changed = copy.deepcopy(plain)
        changed.model.layers[position] = copy.deepcopy(model.model.layers[position])
        with pytest.raises(ValueError, match="no other model than one with hyper-connections"):
            logits(changed)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_layers_with_adapters(model_type, tmp_path):
    from peft import get_peft_model

    base = family_model(model_type)
    model = get_peft_model(base, adapter_config(num_streams=4))
    perturb_hyper_connections(model)
    with model.disable_adapter():
        plain = logits(model)
    full = apply_hyper_connections(family_model(model_type), 4)
    for mine, layer in zip(find_decoder(full).layers, find_decoder(base).layers):
        for name in mine.spec.names:
            getattr(mine, name).load_state_dict(getattr(layer, name).active_module.state_dict())
    assert torch.equal(logits(full), logits(model))
    assert not torch.equal(logits(full), plain)
    order = (0, 2, 2)
    expected = logits(reordered_before(full, order, num_streams=4))
    reorder(base, order)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="must be saved with the layers that it was made for; layer 1 has stood at 2"):
        model.save_pretrained(tmp_path)
    unloaded = model.unload()
    assert type(unloaded) is type(family_model(model_type))
    plain_layer = type(find_decoder(family_model(model_type)).layers[0])
    assert [type(layer) for layer in find_decoder(unloaded).layers] == [plain_layer] * len(order)


def test_hooks_see_streams_between_the_layers():
    model, shapes = connected(0.3), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: shapes.append((args[0].dim(), out.dim())))
    logits(model)
    assert shapes == [(3, 4), (4, 4), (4, 3)]


def test_wrapped_layers_and_a_readout_after_the_norm():
    model = apply_hyper_connections(family_model("llama"), 4, readout="norm_sum", init="paper")
    expected = logits(model)
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    # Compiled, the streams are read by another kernel.
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_gradients_through_copied_and_checkpointed_layers():
    model = connected(0.3).train()
    reorder(model, (0, 0, 1, 2, 2))
    same_gradients_checkpointed(model)
    assert len([m for m in model.modules() if isinstance(m, HyperConnectedLayer)]) == 5


def test_compiled_models_follow():
    torch.compiler.reset()
    model = connected(0.3).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for order in ((0, 1, 2), (0, 2), (1, 0)):
        reorder(model, order)
        result = logits(compiled)
        assert torch.allclose(result, logits(model), rtol=0, atol=1e-5 * result.abs().max().item())
