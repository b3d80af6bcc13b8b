# Code of kromhc-hf, which travels with every model that it saves.
"""The width connection in Triton, with a gradient that takes up the one of the depth connection, and this one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kernels_eager import chain, width_reference
from .kernels_triton import read, write, write_gradient
from .kernels_triton_gradients import gate_gradients, streams_gradient, weight_gradient
from .kernels_triton_projection import gates
from .mixing import Mixing
from .recomputation import Origin


class Width(torch.autograd.Function):
    """Streams `[T, n, C]`, weight `[k, n C]`, bias `[k]` and alpha `[3]` to what the rest of a branch needs.

    These are the streams themselves, the branch input `[T, C]`, `h_post [T, n]` and the residual logits. The depth
    connection mixes the streams that are returned here: what it says about them then arrives here, and is added where
    their gradient is made instead of in a pass of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        weight: Tensor,
        bias: Tensor,
        alpha: Tensor,
        mixing: Mixing,
        eps: float,
        origin: Origin | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h_pre, h_post, logits, products, squares = gates(streams, weight, bias, alpha, eps)
        kept = None if origin else streams
        ctx.save_for_backward(kept, weight, bias, alpha, h_pre, h_post, products, squares)
        ctx.mixing, ctx.eps, ctx.origin = mixing, eps, origin
        return streams.view_as(streams), read(streams, h_pre), h_post, logits

    @staticmethod
    def backward(
        ctx: Any, known: Tensor, grad_input: Tensor, grad_h_post: Tensor, grad_logits: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Under checkpointing they can be asked for once only.
        streams, weight, bias, alpha, h_pre, h_post, products, squares = ctx.saved_tensors
        if ctx.origin is not None:
            streams = ctx.origin.streams()
        if torch.is_grad_enabled():
            # Somebody differentiates again. Aliases: with the inputs, the way from one to another would count as well.
            leaves = [tensor.view_as(tensor) for tensor in (streams, weight, bias, alpha)]
            again = (*leaves, ctx.mixing, ctx.eps)
            _, branch_input, *others = width_reference(*again)
            outputs = (leaves[0], branch_input.to(streams.dtype), *others)
            return *chain(outputs, (known, grad_input, grad_h_post, grad_logits), leaves), None, None, None
        grad_products, grad_squares, (grad_bias, by_output) = gate_gradients(
            grad_input, streams, h_pre, h_post, grad_h_post, grad_logits, products, squares, alpha, ctx.eps
        )
        n = streams.shape[1]
        grad_alpha = torch.stack([part.sum() for part in by_output.tensor_split([n, 2 * n])])
        grad_weight = weight_gradient(streams.flatten(1), grad_products)
        read_from = (streams, h_pre, weight)
        grad_streams = streams_gradient(known, grad_input, *read_from, grad_products, grad_squares)
        return grad_streams, grad_weight, grad_bias, grad_alpha, None, None, None


class Depth(torch.autograd.Function):
    """Writes streams `[T, n, C]` of a shape `[..., n, C]`, of which it keeps none that their origin can write again."""

    @staticmethod
    def forward(
        ctx: Any,
        streams: Tensor,
        h_res: Tensor,
        h_post: Tensor,
        branch_output: Tensor,
        rows_sum_to_one: bool,
        shape: torch.Size,
        origin: Origin | None,
    ) -> Tensor:
        ctx.save_for_backward(h_post, branch_output, h_res, None if origin else streams)
        ctx.origin = origin
        return write(streams, h_res, h_post, branch_output, rows_sum_to_one).view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h_post, branch_output, h_res, streams = ctx.saved_tensors
        if ctx.origin is not None:
            streams = ctx.origin.streams(last_use=False)
        return *write_gradient(grad.flatten(0, -3), streams, h_res, h_post, branch_output), None, None, None

    @staticmethod
    def again(rows_sum_to_one: bool, streams: Tensor, h_post: Tensor, branch_output: Tensor, h_res: Tensor) -> Tensor:
        """What `forward` has computed, `[T, n, C]`, see `recomputation.remember`."""
        return write(streams, h_res, h_post, branch_output, rows_sum_to_one)
