# Code of kromhc-hf, which travels with every model that it saves.
"""Connects the streams in plain PyTorch, with a backward pass of its own that makes few passes over them.

Operations that autograd knows (`connect_reference`) take over where that backward pass has nothing to say: for
derivatives of higher order, in forward mode and in transforms of `torch.func`.

Streams are `[..., n, C]`, and `[T, n, C]` with the tokens in one dimension.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels_eager_passes import (
    Streams,
    correlation,
    different,
    gap_to_one,
    held,
    in_spans,
    product,
    project,
    read,
    store,
    streams_gradient,
    weight_gradient,
    write,
)
from .known_values import all_equal, may_look, number_tensor, refuse_batched
from .mixing import IfDynamic, Mixing, cast, for_tokens
from .recomputation import Origin, origin_of, remember


# Of a handful of tokens the number of operations counts and not their size, unless there are very many products of an
# entry of `h_res` with a feature. The same with and without gradients, so that both give the same bits.
FEW_TOKENS, FEW_PRODUCTS = 16, 1 << 17
AS_IT_IS = nullcontext()


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Leaves autocast; where there is none to leave, at no cost. Meta tensors know none."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return AS_IT_IS
    return torch.autocast(device, enabled=False)


class WidthConnection(torch.autograd.Function):
    """Projects and reads the streams; its backward pass is the one of the mixing as well.

    The output `mixed` stands for `h_res @ streams`: its value is left to the depth connection, its gradient arrives
    here, where one pass over the streams serves mixing, reading, projection and norm. Saved are the streams, which
    autograd holds anyway, unless their origin can write them again, and about 3n numbers per token; the mappings are
    computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,  # [..., n, C]
        weight: Tensor | None,
        bias: Tensor,
        alpha: Tensor | None,
        mixing: Mixing,
        eps: float,
        origin: Origin | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        looked_at = Streams.of(streams.flatten(0, -3))
        tokens = looked_at.tokens
        products, squares = project(tokens, weight, eps)
        h_pre, h_post, h_res = mixing.mappings(products, squares, bias, alpha, tokens.shape[:1])
        ctx.save_for_backward(None if origin else streams, weight, bias, alpha, products, squares)
        ctx.mixing, ctx.eps, ctx.origin = mixing, eps, origin
        ctx.mark_non_differentiable(h_res)
        ctx.set_materialize_grads(False)
        return read(looked_at, h_pre, streams.shape[:-2]), h_post, streams.detach(), h_res

    @staticmethod
    def backward(
        ctx: Any, grad_input: Tensor | None, grad_h_post: Tensor | None, grad_mixed: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        streams, weight, bias, alpha, products, squares = ctx.saved_tensors
        refuse_batched(grad_input, grad_h_post, grad_mixed)
        with without_autocast(bias):
            if ctx.origin is not None:
                streams = ctx.origin.streams()
            if torch.is_grad_enabled():
                grads = (grad_input, grad_h_post, grad_mixed)
                inputs = (streams, weight, bias, alpha)
                return *differentiable_gradients(grads, inputs, ctx.mixing, ctx.eps), None, None, None
            tokens = streams.flatten(0, -3)
            grad_input = None if grad_input is None else grad_input.flatten(0, -2)
            grad_mixed = None if grad_mixed is None else different(grad_mixed)
            leaves = [None if t is None else t.detach().requires_grad_() for t in (products, squares, bias, alpha)]
            with torch.enable_grad():
                mappings = ctx.mixing.mappings(*leaves, tokens.shape[:1])
            h_pre, _, h_res = (mapping.detach() for mapping in mappings)
            if grad_mixed is not None and grad_mixed.shape[1] < h_res.shape[1]:
                h_res = h_res.sum(1, keepdim=True)
            grads = (
                None if grad_input is None else correlation(grad_input.unsqueeze(1), tokens, h_pre.dtype).squeeze(1),
                grad_h_post,
                None if grad_mixed is None else correlation(grad_mixed, tokens, h_pre.dtype).expand_as(mappings[2]),
            )
            grad_products, grad_squares, grad_bias, grad_alpha = chain(mappings, grads, leaves)
            grad_streams, grad_weight = None, None
            if ctx.needs_input_grad[0]:
                grad_streams = streams_gradient(
                    tokens, h_pre, h_res, grad_input, grad_mixed, weight, grad_products, grad_squares
                ).view(streams.shape)
            if weight is not None and grad_products is not None and ctx.needs_input_grad[1]:
                grad_weight = weight_gradient(tokens, weight, grad_products)
        return grad_streams, grad_weight, grad_bias, grad_alpha, None, None, None


class DepthConnection(torch.autograd.Function):
    """Mixes the streams and adds the branch output; `mixed` comes from the width connection, see there.

    Saved are the branch output and n numbers per token, and `h_res` where the streams are to be written again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        h_post: Tensor,
        branch_output: Tensor,
        h_res: Tensor,
        rows_sum_to_one: bool,
        again: bool,
        first: bool,
    ) -> Tensor:
        ctx.save_for_backward(h_post, branch_output, h_res if again else None, mixed if first else None)
        return depth(mixed, h_post, branch_output, h_res, rows_sum_to_one)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h_post, branch_output = ctx.saved_tensors[:2]
        grad_h_post, grad_output = None, None
        refuse_batched(grad)
        with without_autocast(grad):
            if torch.is_grad_enabled():
                wide = cast(grad.flatten(0, -3), h_post.dtype)
                grad_h_post = (wide * branch_output.reshape(wide.shape[0], 1, -1)).sum(-1)
                grad_output = cast((h_post.unsqueeze(-1) * wide).sum(1), branch_output.dtype)
                return grad, grad_h_post, grad_output.view(branch_output.shape), None, None, None, None
            tokens = different(grad)
            if ctx.needs_input_grad[1]:
                outputs = branch_output.reshape(tokens.shape[0], 1, -1)
                grad_h_post = correlation(outputs, tokens, h_post.dtype).squeeze(1).expand(h_post.shape)
            if ctx.needs_input_grad[2]:
                grad_output = branch_output.new_empty(branch_output.shape)
                rows = grad_output.view(tokens.shape[0], 1, -1)
                weights = (h_post if tokens.shape[1] > 1 else h_post.sum(-1, keepdim=True)).unsqueeze(1)
                dtype = held(tokens, h_post.dtype)
                for part, weight, place in in_spans(dtype, tokens, weights, rows):
                    store(place, product(weight, cast(part, dtype), place))
            grad = tokens.view(*grad.shape[:-2], *tokens.shape[1:]).expand(grad.shape)
        return grad, grad_h_post, grad_output, None, None, None, None


def depth(streams: Tensor, h_post: Tensor, branch_output: Tensor, h_res: Tensor, rows_sum_to_one: bool) -> Tensor:
    """What a depth connection computes, `[..., n, C]`."""
    looked_at = Streams.of(streams.flatten(0, -3))
    return write(looked_at, h_res, h_post, branch_output.flatten(0, -2), rows_sum_to_one, streams.shape[:-2])


def differentiable_gradients(
    grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None], mixing: Mixing, eps: float
) -> list[Tensor | None]:
    """The gradients of a width connection in operations that can be differentiated again."""
    # Aliases: with the inputs themselves, the way from one to another would count as well.
    leaves = [None if t is None else t.view_as(t) for t in inputs]
    streams, weight, bias, alpha = leaves
    assert streams is not None
    assert bias is not None
    wide, branch_input, h_post, logits = width_reference(streams.flatten(0, -3), weight, bias, alpha, mixing, eps)
    assert logits is not None  # gradients are enabled
    outputs = (
        cast(branch_input, streams.dtype).view(*streams.shape[:-2], -1),
        h_post.expand(wide.shape[0], -1),
        cast(mixing.mix(wide, logits), streams.dtype).view(streams.shape),
    )
    return chain(outputs, grads, leaves)


def chain(
    outputs: Sequence[Tensor], grads: Sequence[Tensor | None], leaves: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the leaves, through the small graph from them to the mappings."""
    used = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None and output.requires_grad]
    present = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    found = torch.autograd.grad(
        [output for output, _ in used],
        present,
        [grad for _, grad in used],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
        materialize_grads=True,
    )
    rest = iter(found)
    return [None if leaf is None or not leaf.requires_grad else next(rest) for leaf in leaves]


def connect(
    streams: Tensor, weight: IfDynamic, bias: Tensor, alpha: IfDynamic, mixing: Mixing, eps: float, branches: int = 0
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The branch input `[..., C]` of streams `[..., n, C]`, and the depth connection, which takes the branch output.

    Of so many branches that follow each other, at least 2, the first alone saves its streams.
    """
    count = streams.numel()
    if count <= FEW_TOKENS * streams.shape[-2:].numel() and count * streams.shape[-2] <= FEW_PRODUCTS:
        return connect_reference(streams, weight, bias, alpha, mixing, eps)
    sum_to_one = mixing.rows_sum_to_one
    if torch.is_grad_enabled():
        origin, again = origin_of(streams, branches), branches > 1
        inputs = (streams, weight, bias, alpha, mixing, eps, origin)
        branch_input, h_post, mixed, h_res = WidthConnection.apply(*inputs)

        def write_back_with_gradients(branch_output: Tensor) -> Tensor:
            first = again and origin is None
            new = DepthConnection.apply(mixed, h_post, branch_output, h_res, sum_to_one, again, first)
            if again:
                remember(new, origin, partial(depth, rows_sum_to_one=sum_to_one))
            return new

        return branch_input, write_back_with_gradients

    looked_at = Streams.of(streams.flatten(0, -3))
    tokens, leading = looked_at.tokens, streams.shape[:-2]
    h_pre, h_post, logits = mixing.weights_and_logits(*project(tokens, weight, eps), bias, alpha)

    def write_back(branch_output: Tensor) -> Tensor:
        h_res = None if looked_at.stay(sum_to_one) else for_tokens(mixing.matrix(logits), tokens.shape[:1], 2)
        output, gates = branch_output.flatten(0, -2), for_tokens(h_post, tokens.shape[:1])
        return write(looked_at, h_res, gates, output, sum_to_one, leading)

    return read(looked_at, for_tokens(h_pre, tokens.shape[:1]), leading), write_back


def connect_reference(
    streams: Tensor, weight: IfDynamic, bias: Tensor, alpha: IfDynamic, mixing: Mixing, eps: float, branches: int = 0
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same in operations that autograd knows, differentiable any number of times and in forward mode.

    Decoding takes it too, where the number of operations counts and not the size of what they move. Autograd keeps what
    it keeps, whatever `branches` says.
    """
    wide, branch_input, h_post, logits = width_reference(streams, weight, bias, alpha, mixing, eps)

    def write_back(branch_output: Tensor) -> Tensor:
        mixed = wide if logits is None else mixing.mix(wide, logits)
        return cast(torch.addcmul(mixed, h_post.unsqueeze(-1), branch_output.unsqueeze(-2)), streams.dtype)

    return cast(branch_input, streams.dtype), write_back


def width_reference(
    streams: Tensor, weight: Tensor | None, bias: Tensor, alpha: Tensor | None, mixing: Mixing, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of streams `[..., n, C]`, in the dtype of the bias: these, the branch input `[..., C]`, h_post and the logits.

    There are no logits where mixing leaves the streams as they are: equal ones, by rows that sum to 1.
    """
    wide = cast(streams, bias.dtype)
    looks = may_look(wide)
    h_pre, h_post, logits = mixing.weights_and_logits(*project_reference(wide, weight, eps), bias, alpha)
    if looks and not all_equal(streams):
        # Not a batched product, for which a library would wake up all threads.
        return wide, (h_pre.unsqueeze(-1) * wide).sum(-2), h_post, logits
    first = wide.select(-2, 0)
    branch_input = torch.addcmul(first, gap_to_one(h_pre), first)
    if looks and not torch.is_grad_enabled():
        return wide, branch_input, h_post, None if mixing.rows_sum_to_one else logits
    rest = (h_pre[..., 1:, None] * (wide[..., 1:, :] - first.unsqueeze(-2))).sum(-2)
    return wide, branch_input + rest, h_post, logits


def project_reference(wide: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor | None, Tensor | None]:
    """The products of streams `[..., n, C]` with the weight, and mean squares with eps added; see `Mixing.predict`."""
    if weight is None:
        return None, None
    width = weight.shape[1]
    rows = wide if width == wide.shape[-1] else wide.flatten(-2)
    squares = torch.add(number_tensor(eps, rows), (rows * rows).sum(-1, keepdim=True), alpha=1 / width)
    return F.linear(rows, weight), squares
