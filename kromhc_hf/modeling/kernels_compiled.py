# Code of kromhc-hf, which travels with every model that it saves.
"""Projects, reads and writes the streams in operations that a compiler fuses, and so do the gradients.

The same three passes as the Triton kernels, for `torch.compile` on any device. Streams are `[T, n, C]`, sums are in the
dtype of the other operand (at least fp32). Sums over the streams are written out, one term per stream: as one
expression over all elements they fuse with their neighbours, while a batched product would be a call of its own.

What a function returns must have no second name in it: torch 2.11 compiles a backward pass of zeros then (pytorch issue
180642), without a word. A cast that changes nothing makes one, so all of them are left out by `cast`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixing import cast, filled_up, snapped_sum


class Project(torch.autograd.Function):
    """Products `[T, G, k]` and mean squares `[T, G]` of streams and a weight `[k, n * C / G]`."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(streams, weight)
        outputs, width = weight.shape
        rows = cast(streams.reshape(streams.shape[0], -1, width), weight.dtype)
        return F.linear(rows, filled_up(weight))[..., :outputs], rows.square().mean(-1)

    @staticmethod
    def backward(ctx: Any, grad_products: Tensor, grad_squares: Tensor) -> tuple[Tensor, Tensor]:
        streams, weight = ctx.saved_tensors
        width = weight.shape[1]
        rows, grad = cast(streams.reshape(-1, width), weight.dtype), grad_products.flatten(0, 1)
        # Not a product and a sum, which the compiler would take for one call of `addmm` on a copy of the second term.
        grad_rows = torch.addcmul(grad @ weight, grad_squares.reshape(-1, 1) * (2 / width), rows)
        return cast(grad_rows.view(streams.shape), streams.dtype), grad.t() @ rows


class Read(torch.autograd.Function):
    """`sum_j h_pre[j] streams[j]`: `[T, n, C]` and `[T, n]` -> `[T, C]`."""

    @staticmethod
    def forward(ctx: Any, streams: Tensor, h_pre: Tensor) -> Tensor:
        ctx.save_for_backward(streams, h_pre)
        first, *others = cast(streams, h_pre.dtype).unbind(1)
        # Relative to the first stream, so that equal streams are not even rounded.
        total = snapped_sum(h_pre) * first
        for j, stream in enumerate(others, start=1):
            total = torch.addcmul(total, h_pre[:, j : j + 1], stream - first)
        return cast(total, streams.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        streams, h_pre = ctx.saved_tensors
        grad = cast(grad, h_pre.dtype).unsqueeze(1)
        return cast(h_pre.unsqueeze(-1) * grad, streams.dtype), (streams * grad).sum(-1)


class Write(torch.autograd.Function):
    """`sum_j h_res[i, j] streams[j] + h_post[i] branch_output`, `[T, n, C]`."""

    @staticmethod
    def forward(
        ctx: Any, streams: Tensor, h_res: Tensor, h_post: Tensor, branch_output: Tensor, rows_sum_to_one: bool
    ) -> Tensor:
        ctx.save_for_backward(streams, h_res, h_post, branch_output)
        first, *others = cast(streams, h_res.dtype).split(1, dim=1)
        mixed = first if rows_sum_to_one else snapped_sum(h_res) * first
        for j, stream in enumerate(others, start=1):
            mixed = torch.addcmul(mixed, h_res[..., j : j + 1], stream - first)
        output = cast(branch_output, h_post.dtype).unsqueeze(1)
        return cast(torch.addcmul(mixed, h_post.unsqueeze(-1), output), streams.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        streams, h_res, h_post, branch_output = ctx.saved_tensors
        # Also where it is one gradient for all streams, for the batched product.
        grad = cast(grad, h_res.dtype).contiguous()
        mixed, output = torch.zeros_like(grad), torch.zeros_like(grad[:, 0])
        for i, row in enumerate(grad.unbind(1)):
            mixed = torch.addcmul(mixed, h_res[:, i].unsqueeze(-1), row.unsqueeze(1))
            output = torch.addcmul(output, h_post[:, i : i + 1], row)
        return (
            cast(mixed, streams.dtype),
            # A call, although sums that fuse are a little faster: Inductor's lost three digits in a model.
            torch.bmm(grad, cast(streams, grad.dtype).mT),
            (grad * branch_output.unsqueeze(1)).sum(-1),
            cast(output, branch_output.dtype),
            None,
        )
