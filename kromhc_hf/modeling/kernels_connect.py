# Code of kromhc-hf, which travels with every model that it saves.
"""How passes over the streams, compiled or in Triton, make a width and a depth connection."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels_compiled import Project, Read, Write
from .kernels_triton import read, write
from .kernels_triton_language import LARGEST_OUTPUTS
from .kernels_triton_projection import project
from .kernels_triton_width import Depth, Width
from .mixing import IfDynamic, Mixing
from .recomputation import Origin, origin_of, remember, saved_as


# From streams `[..., n, C]`, weight, bias, alpha, the mixing, eps and how many branches share the streams that are kept
# (see recomputation.py) to the branch input `[..., C]` and the depth connection, which takes the branch output.
Connect = Callable[
    [Tensor, IfDynamic, Tensor, IfDynamic, Mixing, float, int], tuple[Tensor, Callable[[Tensor], Tensor]]
]


class Passes(NamedTuple):
    """The passes over the streams, each with a gradient of its own, between which autograd does the rest."""

    project: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    read: Callable[[Tensor, Tensor], Tensor]
    write: Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]


COMPOSITE = Passes(Project.apply, Read.apply, Write.apply)
TRITON = Passes(project, read, write)


def connect_passes(
    streams: Tensor,
    weight: Tensor | None,
    bias: Tensor,
    alpha: Tensor | None,
    mixing: Mixing,
    eps: float,
    branches: int = 0,
    *,
    passes: Passes,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The branch input `[..., C]` of streams `[..., n, C]`, and the depth connection, which takes the branch output."""
    tokens = streams.flatten(0, -3)
    origin = origin_of(streams, branches)
    with saved_as(streams, origin):
        products, squares = None, None
        if weight is not None:
            products, squares = passes.project(tokens, weight)
            squares = (squares + eps).unsqueeze(-1)
            if products.shape[1] == 1:
                products, squares = products.squeeze(1), squares.squeeze(1)
        h_pre, h_post, h_res = mixing.mappings(products, squares, bias, alpha, tokens.shape[:1])
        branch_input = passes.read(tokens, h_pre)
    depth = _depth_connection(
        tokens, h_res, h_post, mixing.rows_sum_to_one, streams.shape, origin, branches, passes.write
    )
    return branch_input.view(*streams.shape[:-2], -1), depth


def _depth_connection(
    tokens: Tensor,
    h_res: Tensor,
    h_post: Tensor,
    sum_to_one: bool,
    shape: torch.Size,
    origin: Origin | None,
    branches: int,
    write: Callable[..., Tensor],
) -> Callable[[Tensor], Tensor]:
    def write_back(branch_output: Tensor) -> Tensor:
        output = branch_output.flatten(0, -2)
        if branches < 2:
            return write(tokens, h_res, h_post, output, sum_to_one).view(shape)
        new = Depth.apply(tokens, h_res, h_post, output, sum_to_one, shape, origin)
        remember(new, origin, partial(Depth.again, sum_to_one))
        return new

    return write_back


def fuses(weight: Tensor | None, mixing: Mixing) -> bool:
    """Whether the Triton kernel of the projection makes the gates as well."""
    return weight is not None and mixing.plain_gates and weight.shape[0] <= LARGEST_OUTPUTS


def connect_triton(
    streams: Tensor, weight: IfDynamic, bias: Tensor, alpha: IfDynamic, mixing: Mixing, eps: float, branches: int = 0
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same in Triton, with the gates in the kernel of the projection where they are sigmoids of it."""
    if not fuses(weight, mixing):
        return connect_passes(streams, weight, bias, alpha, mixing, eps, branches, passes=TRITON)
    origin = origin_of(streams, branches)
    inputs = (streams.flatten(0, -3), weight, bias, alpha, mixing, eps, origin)
    tokens, branch_input, h_post, logits = Width.apply(*inputs)
    h_res, sum_to_one = mixing.matrix(logits), mixing.rows_sum_to_one
    depth = _depth_connection(tokens, h_res, h_post, sum_to_one, streams.shape, origin, branches, write)
    return branch_input.view(*streams.shape[:-2], -1), depth
