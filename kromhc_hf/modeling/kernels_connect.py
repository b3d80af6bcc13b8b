# Code of kromhc-hf, which travels with every model that it saves.
"""How passes over the streams, compiled or in Triton, make a width and a depth connection."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .kernels_compiled import Project, Read, Write
from .kernels_triton import read, write
from .kernels_triton_language import LARGEST_OUTPUTS
from .kernels_triton_projection import project
from .kernels_triton_width import Width
from .mixing import Mixing


# From streams `[..., n, C]`, weight, bias, alpha, the mixing and eps to the branch input `[..., C]` and the depth
# connection, which takes the branch output.
Connect = Callable[
    [Tensor, Tensor | None, Tensor, Tensor | None, Mixing, float], tuple[Tensor, Callable[[Tensor], Tensor]]
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
    passes: Passes,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The branch input `[..., C]` of streams `[..., n, C]`, and the depth connection, which takes the branch output."""
    tokens = streams.flatten(0, -3)
    products, squares = (None, None) if weight is None else passes.project(tokens, weight)
    h_pre, h_post, h_res = mixing.mappings(products, squares, bias, alpha, eps, tokens.shape[:1])
    branch_input = passes.read(tokens, h_pre)

    def write_back(branch_output: Tensor) -> Tensor:
        output = branch_output.flatten(0, -2)
        return passes.write(tokens, h_res, h_post, output, mixing.rows_sum_to_one).view(streams.shape)

    return branch_input.view(*streams.shape[:-2], -1), write_back


def fuses(weight: Tensor | None, mixing: Mixing) -> bool:
    """Whether the Triton kernel of the projection makes the gates as well."""
    return weight is not None and mixing.plain_gates and weight.shape[0] <= LARGEST_OUTPUTS


def connect_triton(
    streams: Tensor, weight: Tensor | None, bias: Tensor, alpha: Tensor | None, mixing: Mixing, eps: float
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The same in Triton, with the gates in the kernel of the projection where they are sigmoids of it."""
    if not fuses(weight, mixing):
        return connect_passes(streams, weight, bias, alpha, mixing, eps, TRITON)
    tokens, branch_input, h_post, logits = Width.apply(streams.flatten(0, -3), weight, bias, alpha, mixing, eps)
    h_res = mixing.matrix(logits)

    def write_back(branch_output: Tensor) -> Tensor:
        output = branch_output.flatten(0, -2)
        return write(tokens, h_res, h_post, output, mixing.rows_sum_to_one).view(streams.shape)

    return branch_input.view(*streams.shape[:-2], -1), write_back
