"""How many parameters hyper-connections add, for any setting, counted on modules that hold no memory."""

from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from .modeling.decoder_layer import make_expansion, make_readout
from .modeling.hyper_connection import HyperConnection
from .modeling.options import OPTIONS, StreamKeywords, StreamOptions, given_options, show_options
from .modeling.stream_ends import READOUTS
from .official.modules import official_module


if TYPE_CHECKING:
    from typing import Unpack


@show_options(StreamKeywords)
def count_parameters(
    hidden_size: int,
    *positional: Any,
    num_branches: int = 1,
    published: bool = False,
    **options: "Unpack[StreamKeywords]",
) -> int:
    """The number of parameters that hyper-connections add to a model.

    Args:
        hidden_size: C.
        num_branches: how many residual branches have a hyper-connection; 24 for 12 layers of two.
        published: count the authors' modules instead, with their learned gain and redundant logits.
        **options: of the hyper-connections, see `StreamOptions`.

    Raises:
        ValueError: for an unknown variant, one not defined for `num_streams`, `layers`, in whose place `num_branches`
            stands here, or `published` without official module or with options that it does not have.
    """
    given = given_options(positional, options)
    if given.get("layers") is not None:
        raise ValueError(
            f"layers must be left out where num_branches says how many branches are counted; got {given['layers']!r}. "
            "Use num_branches=8 for four layers of two."
        )
    if published:
        # The official modules have limits of their own for the number of streams.
        StreamOptions(**{"init": "paper", **given, "variant": "identity"})
        defaults = {name: option.default for name, option in OPTIONS.items()}
        return num_branches * _published(hidden_size, {**defaults, **given})
    # Neither init adds anything, and the paper's goes with every readout.
    chosen = StreamOptions(**{"init": "paper", **given})
    branch = HyperConnection(hidden_size, chosen.num_streams, device="meta", **chosen.of_branch())
    ends = (make(chosen, hidden_size, "meta") for make in (make_expansion, make_readout))
    return num_branches * _count(branch) + sum(map(_count, ends))


def _published(hidden_size: int, options: dict[str, Any]) -> int:
    """The parameters of one official module."""
    names = ("dynamic", "stream_embedding", "readout", "generator", "read")
    dynamic, embedding, readout, generator, read = (options[name] for name in names)
    stored_otherwise = (generator, read) != ("dense", "weights")
    if not dynamic or embedding or READOUTS[readout].module is not None or stored_otherwise:
        raise ValueError(
            "published counts the official modules, which are dynamic, dense, without stream embedding or learned "
            f"readout; got dynamic={dynamic}, stream_embedding={embedding}, readout={readout!r}, "
            f"generator={generator!r}, read={read!r}. "
            "Leave these at their defaults."
        )
    return sum(map(prod, official_module(options["variant"]).shapes(options["num_streams"], hidden_size).values()))


def _count(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
