"""Recording what the streams of a live model do: the mappings of every branch, and the streams they come from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.composite import text_model_of
from ..modeling.decoder_layer import HyperConnectedLayer
from .native_streams import BranchRecord, Reader, native_branches


def branches(model: nn.Module) -> dict[str, nn.Module]:
    """The hyper-connections of a model in the order of the branches, under names such as `layers.0.attn_hc`.

    The name is the path from the innermost model that holds the layers, the same under any wrapper.

    Raises:
        ValueError: if the model has none.
    """
    found = {
        ".".join([*path.split(".")[-2:], name]): getattr(layer, name)
        for path, layer in model.named_modules()
        if isinstance(layer, HyperConnectedLayer)
        for name in layer.spec.names
    }
    if not found:
        raise ValueError(
            f"model must have hyper-connections; got {type(model).__name__} without them. "
            "Call apply_hyper_connections(model, num_streams=4) first."
        )
    return found


@contextmanager
def record_mappings(
    model: nn.Module, input_ids: Tensor | None = None, *, max_tokens: int | None = None, append: bool = False
) -> Iterator[dict[str, BranchRecord]]:
    """Records the mappings and the streams of every branch while the model runs inside the `with` block.

        with record_mappings(model, input_ids) as records:
            records["layers.0.attn_hc"].h_res  # [B, S, n, n]

    Nothing the model computes changes, gradients and checkpointed layers included, and outside of the block nothing is
    left in the model. The recording is done by hooks, which a compiled graph cannot see, so models compiled with
    `torch.compile` run eagerly inside the block, the same numbers up to the compiler's rounding.

    Args:
        model: a model with hyper-connections, wrapped or not, or one of a family that has streams of its own
            (deepseek_v4, hy_v4, glm5_next, qwen4_exp), whose matrix is given in the orientation of this package.
        input_ids: `[B, S]`, to run the model on right away, without gradients and in its present mode; by default it
            is run inside the block, and as often as you like.
        max_tokens: take only the first tokens of the first sequence, padding among them, which bounds memory and time.
        append: join the tokens of all forwards, as `generate` with a cache makes them; by default every forward
            replaces the record of the one before.

    Yields:
        The records by branch name, in the order of the branches; empty until the model has run.

    Raises:
        ValueError: if the model has no hyper-connections, or a forward to append to the records has gradients.
    """
    records: dict[str, BranchRecord] = {}

    def first_tokens(streams: Tensor) -> Tensor:
        return streams.detach() if max_tokens is None else streams.detach()[:1, :max_tokens]

    def take(name: str, made: Callable[[], BranchRecord]) -> None:
        # A checkpointed layer runs once more in the backward pass and would be appended twice.
        if append and torch.is_grad_enabled():
            raise ValueError(
                "append=True must be used without gradients; got a forward that records them. "
                "Use generate or torch.no_grad()."
            )
        with torch.no_grad():
            # Static mappings without a constraint are the parameter itself, which training goes on to change.
            latest = BranchRecord._make(part.detach().clone() if part.requires_grad else part for part in made())
            if append and name in records:
                pairs = zip(records[name], latest)
                latest = BranchRecord._make(torch.cat(pair, dim=1)[:, :max_tokens] for pair in pairs)
        records[name] = latest

    def own_hook(name: str) -> Callable[..., None]:
        def record(module: Any, args: tuple[Tensor, ...]) -> None:
            streams = first_tokens(args[0])
            take(name, lambda: BranchRecord._make((*module.mappings(streams), streams)))

        return record

    def native_hook(name: str, read: Reader) -> Callable[..., None]:
        def record(module: Any, args: tuple[Tensor, ...], output: Any) -> None:
            take(name, lambda: BranchRecord._make(map(first_tokens, read(module, args[0], output))))

        return record

    native = native_branches(model)
    handles = [module.register_forward_hook(native_hook(name, read)) for name, (module, read) in native.items()]
    if not native:
        handles = [module.register_forward_pre_hook(own_hook(name)) for name, module in branches(model).items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            if input_ids is not None:
                with torch.no_grad():
                    text_model_of(model)(input_ids=input_ids)
            yield records
    finally:
        for handle in handles:
            handle.remove()
