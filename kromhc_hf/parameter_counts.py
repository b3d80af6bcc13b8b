"""How many parameters hyper-connections add, for any setting, without building a model."""

from math import prod

from .modeling.hyper_connection import check_init
from .modeling.stream_ends import LEARNED_READOUTS
from .modeling.variants import make_mixing
from .official.modules import official_module


def count_parameters(
    hidden_size: int,
    num_streams: int = 4,
    variant: str = "kromhc",
    *,
    num_branches: int = 1,
    dynamic: bool = True,
    readout: str = "mean",
    stream_embedding: bool = False,
    published: bool = False,
) -> int:
    """The number of parameters that hyper-connections add to a model.

    Args:
        hidden_size: C.
        num_streams: n.
        variant: parametrisation of the mixing matrix.
        num_branches: how many residual branches have a hyper-connection; 24 for 12 layers of two.
        dynamic: whether the mappings depend on the token.
        readout: how the streams are joined; the learned ones add parameters once per model.
        stream_embedding: whether streams get a learned embedding at expansion, once per model.
        published: count the authors' modules instead, with their learned gain and redundant logits.

    Raises:
        ValueError: for an unknown variant, one not defined for `num_streams`, or `published` without official module
            or with options that it does not have.
    """
    if published:
        if not dynamic or stream_embedding or readout not in ("mean", "sum", "norm_sum"):
            raise ValueError(
                "published counts the official modules, which are dynamic, without stream embedding or learned "
                f"readout; got dynamic={dynamic}, stream_embedding={stream_embedding}, readout={readout!r}. "
                "Leave these at their defaults."
            )
        return num_branches * sum(map(prod, official_module(variant).shapes(num_streams, hidden_size).values()))

    check_init("paper", readout)
    mixing = make_mixing(variant, num_streams)
    if num_streams == 1:
        return 0
    per_branch = 2 * num_streams + mixing.num_logits
    if dynamic:
        per_branch += prod(mixing.weight_shape(hidden_size)) + 3
    ends = num_streams * hidden_size if stream_embedding else 0
    if readout in LEARNED_READOUTS:
        ends += sum(map(prod, LEARNED_READOUTS[readout].shapes(hidden_size, num_streams).values()))
    return num_branches * per_branch + ends
