# Code of kromhc-hf, which travels with every model that it saves.
"""Streams that are not kept for the backward pass, but written again: only those where a block of branches begins are.

A depth connection keeps its branch output and its mappings, so the streams that it wrote follow from those it was given
(mHC, arXiv 2512.24880, section 4.3). The graph of autograd is the record: the node that wrote some streams is found on
them, and leads from node to node back to the first streams of the block. Nodes hold earlier ones alone, which the graph
holds anyway, so nothing lives longer than it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Origin(NamedTuple):
    """What wrote some streams, and can write them again.

    Args:
        node: the depth connection in the graph of autograd, made by `remember`.
        branch: how many branches they are behind the first streams of their block.
        rebuilt: the streams of the block that are there at present, by branch.
    """

    node: Any
    branch: int
    rebuilt: dict[int, Tensor]

    def streams(self, last_use: bool = True) -> Tensor:
        """The streams, bit for bit. They and later ones are let go of, unless they are asked for once more."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "derivatives of higher order need all streams, and stream_recompute keeps those alone where a block "
                "begins. Set hc_stream_recompute of the configuration to 'none'."
            )
        nodes, nearest = [], self
        while nearest.branch not in self.rebuilt:
            nodes.append(nearest.node)
            if nearest.node.origin is None:
                break
            nearest = nearest.node.origin
        streams: Any = self.rebuilt.get(nearest.branch)
        for node in reversed(nodes):
            h_post, branch_output, h_res, first = node.saved_tensors
            streams = node.again(first if streams is None else streams, h_post, branch_output, h_res)
            self.rebuilt[node.place.branch] = streams
        for branch in [i for i in self.rebuilt if i > self.branch or (last_use and i == self.branch)]:
            del self.rebuilt[branch]
        return streams


class Place(NamedTuple):
    """Where the streams are that a node wrote, to know them again by."""

    branch: int
    looks: tuple[Any, ...]


def origin_of(streams: Tensor, branches: int) -> Origin | None:
    """What wrote these streams, if that was inside of a block of so many branches; None where they must be kept.

    They are known by their place in memory, their shape and their version: streams that were changed, copied or moved
    on the way are others, and begin a block.
    """
    if branches < 2 or streams.grad_fn is None or not torch.is_grad_enabled():
        return None
    # FSDP puts a node of its own between its modules, which passes the tensor on.
    for node in (streams.grad_fn, *(node for node, _ in streams.grad_fn.next_functions)):
        place = getattr(node, "place", None)
        if isinstance(place, Place) and place.branch < branches and place.looks == _looks(streams):
            return Origin(node, place.branch, node.rebuilt)  # type: ignore[union-attr]
    return None


def saved_as(streams: Tensor, origin: Origin | None) -> AbstractContextManager[Any]:
    """Has functions of autograd that save these streams save their origin instead, if there is one."""

    if origin is None:
        return nullcontext()

    def pack(tensor: Tensor) -> Any:
        whole = tensor.data_ptr() == streams.data_ptr() and tensor.numel() == streams.numel()
        return tensor.shape if whole else tensor

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else origin.streams(last_use=False).view(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def remember(streams: Tensor, origin: Origin | None, again: Callable[..., Tensor]) -> None:
    """Notes on the node that wrote these streams how it did.

    Args:
        streams: what a function of autograd has returned.
        origin: of the streams that it was given; None where it saved them.
        again: makes them once more, of the streams that it was given, `h_post`, the branch output and `h_res`; the
            last three must be what the node has saved, and the streams behind them where there is no origin.
    """
    node: Any = streams.grad_fn
    if node is not None:
        node.origin, node.again = origin, again
        node.rebuilt = {} if origin is None else origin.rebuilt
        node.place = Place(1 if origin is None else origin.branch + 1, _looks(streams))


def _looks(streams: Tensor) -> tuple[Any, ...]:
    return streams.data_ptr(), streams._version, streams.dtype, streams.shape, streams.stride()
