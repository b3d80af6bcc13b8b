"""A row for a model type that nobody has described: read from the source of its layers, and kept if a check holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .applying import apply_hyper_connections, remove_hyper_connections
from .evaluation_mode import evaluation_mode
from .modeling.connection_plan import find_decoder, present_plan
from .modeling.layer_fit import fit_layer
from .modeling.layer_loop import layer_loops
from .modeling.layer_spec import LayerSpec, Row, attribute, row_of
from .modeling.outside_families import REGISTERED, checked_family
from .own_families import register_family, unregister_family
from .row_reading import read_row


# Of the check: tokens to run on, and tokens to generate.
LENGTH, NEW = 12, 8
# Parallel branches are summed in another order than by the layer itself.
REORDERED = 1e-5


def derive_family(model: Any) -> Row:
    """Reads a row from the source of a model's decoder layers and registers it, see `register_family`.

    The source is followed statement by statement; what is not plainly a sum of the residual and branches is refused.
    The row is kept only if a check on the live model holds: every layer runs once in a forward and is given what the
    one before it returned; with hyper-connections of init "identity" the logits are the same bits (up to rounding,
    where the layer adds parallel branches in another order), and so is what is generated with a cache. The model
    itself is afterwards what it was. What is made by the row says in its representation, in the report of a
    conversion and in the model card that it was derived.

    Args:
        model: a causal language model of a type that has no row.

    Returns:
        The row.

    Raises:
        ValueError: with the line that was not understood, or the part of the check that failed. No row is kept then.
    """
    model_type = model.config.model_type
    if model_type in REGISTERED:
        raise ValueError(f"model_type {model_type!r} has a row already. Call unregister_family({model_type!r}) first.")
    row = derived_row(model)
    checked_family(model_type, row)
    register_family(model_type, row)
    try:
        check_derived(model)
    except BaseException:
        unregister_family(model_type)
        raise
    return row


def derived_row(model: Any) -> Row:
    """The row that the source of a model's layers says, which nothing has been run to check.

    Raises:
        ValueError: with the line that was not understood.
    """
    path, layers = _layers_of(model)
    specs = [read_row(layer, path) for layer in layers]
    if _mistaken(model, layers, specs) is not None:
        specs = [replace(spec, layer_class=type(layer).__name__) for layer, spec in zip(layers, specs)]
    if (position := _mistaken(model, layers, specs)) is not None:
        raise ValueError(
            f"layer {position} ({type(layers[position]).__name__}) must fit the row that was read from it alone; it "
            "fits that of another layer of its class too, which no row can tell from it."
        )
    return row_of(tuple(dict.fromkeys(specs)))


def _mistaken(model: Any, layers: nn.ModuleList, specs: list[LayerSpec]) -> int | None:
    """The first layer that fits what was read from another one before what was read from it; None if there is none."""
    kinds = tuple(dict.fromkeys(specs))
    family = checked_family(model.config.model_type, kinds)
    fitted = (fit_layer(layer, kinds, position, family) for position, layer in enumerate(layers))
    return next((position for position, spec in enumerate(fitted) if spec != specs[position]), None)


def _layers_of(model: Any) -> tuple[str, nn.ModuleList]:
    """The path from the base model to its decoder layers, and these."""
    base = model.base_model
    base_class: Any = type(base)
    loops = layer_loops(base_class)
    found = {loop.layers: attribute(base, loop.layers) for loop in loops}
    lists = {path: layers for path, layers in found.items() if isinstance(layers, nn.ModuleList) and len(layers) > 0}
    if len(lists) != 1:
        raise ValueError(
            f"{type(base).__name__}.forward must have one loop over a list of layers for a row to be read; it has "
            f"{len(lists)}. Write a row with register_family."
        )
    return next(iter(lists.items()))


def load_for_reading(folder: Path, trust_remote_code: bool, weight_variant: str | None = None) -> Any:
    """A causal language model from a folder, by its own code only where transformers has none and it is trusted."""
    model_type = PreTrainedConfig.get_config_dict(folder)[0].get("model_type", "")
    code = trust_remote_code and model_type not in CONFIG_MAPPING
    return AutoModelForCausalLM.from_pretrained(folder, variant=weight_variant, dtype="auto", trust_remote_code=code)


@torch.no_grad()
def check_derived(model: Any) -> None:
    """Refuses a model that does not compute with hyper-connections by its derived row what it computes without.

    Raises:
        ValueError: naming what differs. The model is what it was in any case.
    """
    _, layers = _layers_of(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (2, LENGTH), generator=generator)
    tokens = ids.to(next(model.parameters()).device)
    with evaluation_mode(model):
        expected = _run_once_each(model, layers, tokens)
        continued = _continuation(model, tokens)
        apply_hyper_connections(model)
        try:
            exact = all(spec.exact for spec in present_plan(find_decoder(model)).specs)
            found, generated = model(tokens).logits, _continuation(model, tokens)
        finally:
            remove_hyper_connections(model)
    difference = (found - expected).abs().max().item()
    allowed = 0 if exact else REORDERED * expected.abs().max().item()
    if not difference <= allowed or not torch.equal(generated, continued):
        what = "generates other tokens" if difference <= allowed else f"has logits that differ by {difference:.3g}"
        _refuse(model, f"it {what} with hyper-connections that should change nothing")


def _continuation(model: Any, tokens: Tensor) -> Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), use_cache=True, **options)


def _run_once_each(model: Any, layers: nn.ModuleList, tokens: Tensor) -> Tensor:
    """The logits, of a model in which every layer runs once and is given what the one before it returned."""
    given: list[tuple[int, Any]] = []
    returned: list[Any] = []

    def before(position: int) -> Any:
        return lambda layer, args, kwargs: given.append((position, args[0] if args else kwargs.get("hidden_states")))

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        returned.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(after) for layer in layers]
    handles += [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        logits = model(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    order = [position for position, _ in given]
    if order != [*range(len(layers))]:
        _refuse(model, f"its layers run in the order {order[:20]}, and not each one once")
    if any(one is None or not torch.equal(one, other) for (_, one), other in zip(given[1:], returned)):
        _refuse(model, "a layer is given something else than what the one before it returned")
    return logits


def _refuse(model: Any, what: str) -> None:
    raise ValueError(
        f"the row that was read from the layers of {type(model).__name__} must not be used: {what}. Write a row with "
        "register_family, if the words for rows can say it."
    )
