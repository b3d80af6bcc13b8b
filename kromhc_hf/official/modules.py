"""Weights of the authors' own hyper-connection modules, turned into a HyperConnection that computes the same.

Their modules differ from ours in form only: the RMS norm has a learned gain (folded into `weight` here), there is a
logit for every permutation (the identity's is pinned to 0 here), and the mixing matrix is applied transposed.
"""

from collections.abc import Callable, Mapping
from itertools import permutations
from math import factorial
from typing import NamedTuple

import torch
from torch import Tensor

from ..modeling.hyper_connection import HyperConnection
from ..modeling.variants_permutations import prime_factors


# Their norm divides by max(|x|, 1e-12), ours by sqrt(mean(x^2) + eps): over the normed features this is the same floor.
SMALLEST_NORM_SQUARED = 1e-24

Shape = tuple[int, ...]
# (rows, number of streams) -> (rows for reading, rows for mixing)
Split = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class OfficialModule(NamedTuple):
    """How an official module stores its parameters."""

    # (number of streams, hidden size) -> shape of every tensor
    shapes: Callable[[int, int], dict[str, Shape]]
    # Names of the scalars in front of the dynamic read, write and mixing logits.
    scales: tuple[str, str, str]
    split_static: Split  # of static_alpha
    split_dynamic: Split  # of dynamic_alpha_fn, transposed


def import_reference_state_dict(state_dict: Mapping[str, Tensor], *, variant: str = "kromhc") -> HyperConnection:
    """The HyperConnection with the weights of an official module, in the dtype of its tensors.

    Exact for any parameters, not only initial ones: the outputs agree to rounding (arXiv 2601.21579, 2512.24880,
    2601.05732, 2409.19606). A float64 state dict gives a module that computes in float64.

    Args:
        state_dict: tensors by the official names, `norm.gamma`, `static_alpha`, `dynamic_alpha_fn`, `static_beta`,
            `dynamic_beta_fn`, and the scalars `pre_branch_scale`, `h_post_scale`, `residual_scale` (for "hc"
            `dynamic_alpha_scale` and `dynamic_beta_scale`), without any prefix.
        variant: which of the official modules they come from: "kromhc", "mhc", "mhc_lite" or "hc".

    Raises:
        ValueError: if the variant has no official module, or a tensor is missing, unknown or of a wrong shape.
    """
    official = official_module(variant)
    hidden_size, n = _check_tensors(state_dict, official, variant)
    read_bias, residual_bias = official.split_static(state_dict["static_alpha"], n)
    read_rows, residual_rows = official.split_dynamic(state_dict["dynamic_alpha_fn"].T, n)
    gain = 1 + state_dict["norm.gamma"]
    write_rows = state_dict["dynamic_beta_fn"].reshape(gain.numel(), -1).T

    module = HyperConnection(hidden_size, n, variant=variant, eps=SMALLEST_NORM_SQUARED / gain.numel()).to(gain.dtype)
    module.load_state_dict(
        {
            "bias": torch.cat([read_bias, state_dict["static_beta"], residual_bias]),
            "weight": torch.cat([read_rows, write_rows, residual_rows]) * gain,
            "alpha": torch.stack([state_dict[name].reshape(()) for name in official.scales]),
        }
    )
    return module


def official_module(variant: str) -> OfficialModule:
    """How the official module of a variant stores its parameters.

    Raises:
        ValueError: if the variant has none that is known here.
    """
    if variant not in OFFICIAL_MODULES:
        raise ValueError(f"variant must be one of {', '.join(OFFICIAL_MODULES)}; got {variant!r}.")
    return OFFICIAL_MODULES[variant]


def _check_tensors(state_dict: Mapping[str, Tensor], official: OfficialModule, variant: str) -> tuple[int, int]:
    """The hidden size and the number of streams of an official state dict, after checking names and shapes."""
    names = official.shapes(2, 1)
    missing, unknown = set(names) - set(state_dict), set(state_dict) - set(names)
    if missing or unknown:
        raise ValueError(
            f"state_dict must hold exactly the tensors {', '.join(names)} of one {variant} module; "
            f"missing: {', '.join(sorted(missing)) or 'none'}; unknown: {', '.join(sorted(unknown)) or 'none'}. "
            "Strip the prefix of the module, and pass the tensors of one module only."
        )
    num_streams = state_dict["static_beta"].numel()
    streams_per_norm = official.shapes(num_streams, 1)["norm.gamma"][0]
    hidden_size = state_dict["norm.gamma"].numel() // streams_per_norm
    for name, shape in official.shapes(num_streams, hidden_size).items():
        # The scalars are stored as [] in some versions and as [1] in others.
        if tuple(state_dict[name].shape) != shape and not (shape == () and state_dict[name].numel() == 1):
            raise ValueError(
                f"{name} must be of shape {shape} in a {variant} module with {num_streams} streams of size "
                f"{hidden_size}; got {tuple(state_dict[name].shape)}. Name the variant that it was trained with."
            )
    return hidden_size, num_streams


def _permutation_counts(num_streams: int) -> list[int]:
    return [factorial(size) for size in prime_factors(num_streams)]


def _manifold_shapes(static_alpha: Callable[[int], Shape]) -> Callable[[int, int], dict[str, Shape]]:
    """Shapes of the modules whose predictors see all streams side by side."""

    def shapes(num_streams: int, hidden_size: int) -> dict[str, Shape]:
        static, width = static_alpha(num_streams), num_streams * hidden_size
        outputs = static[0] * (static[1] if len(static) == 2 else 1)
        return {
            "norm.gamma": (width,),
            "static_alpha": static,
            "dynamic_alpha_fn": (width, outputs),
            "static_beta": (num_streams,),
            "dynamic_beta_fn": (width, num_streams),
            **dict.fromkeys(MANIFOLD_SCALES, ()),
        }

    return shapes


def _hc_shapes(num_streams: int, hidden_size: int) -> dict[str, Shape]:
    """Shapes of the module whose predictors see one stream at a time."""
    return {
        "norm.gamma": (hidden_size,),
        "static_alpha": (num_streams, 1 + num_streams),
        "dynamic_alpha_fn": (hidden_size, 1 + num_streams),
        "static_beta": (num_streams,),
        "dynamic_beta_fn": (hidden_size,),
        **dict.fromkeys(HC_SCALES, ()),
    }


def _split_kromhc(rows: Tensor, num_streams: int) -> tuple[Tensor, Tensor]:
    """One row per permutation of each factor."""
    parts = rows[num_streams:].split(_permutation_counts(num_streams))
    return rows[:num_streams], torch.cat([_relative(p, size) for p, size in zip(parts, prime_factors(num_streams))])


def _split_mhc_lite(rows: Tensor, num_streams: int) -> tuple[Tensor, Tensor]:
    """One row per permutation of the streams."""
    return rows[:num_streams], _relative(rows[num_streams:], num_streams)


def _relative(rows: Tensor, size: int) -> Tensor:
    """Logits of all permutations -> relative to the identity's, which drops out; transposed, as theirs are applied."""
    orders = list(permutations(range(size)))
    inverse = [orders.index(tuple(sorted(range(size), key=order.__getitem__))) for order in orders]
    return rows[inverse[1:]] - rows[:1]


def _split_static_square(rows: Tensor, num_streams: int) -> tuple[Tensor, Tensor]:
    """`[n, 1 + n]`: for each source stream its read weight, then where it is mixed to."""
    return rows[:, 0], rows[:, 1:].T.flatten()


def _split_dynamic_square(rows: Tensor, num_streams: int) -> tuple[Tensor, Tensor]:
    """`[n * (1 + n), features]`: the same, a block of 1 + n rows per source stream."""
    blocks = rows.unflatten(0, (num_streams, 1 + num_streams))
    return blocks[:, 0], blocks[:, 1:].transpose(0, 1).flatten(0, 1)


def _split_shared(rows: Tensor, num_streams: int) -> tuple[Tensor, Tensor]:
    """One row for reading and one per target stream, shared by all source streams."""
    return rows[:1], rows[1:]


MANIFOLD_SCALES = ("pre_branch_scale", "h_post_scale", "residual_scale")
HC_SCALES = ("dynamic_alpha_scale", "dynamic_beta_scale", "dynamic_alpha_scale")

OFFICIAL_MODULES = {
    "kromhc": OfficialModule(
        _manifold_shapes(lambda n: (n + sum(_permutation_counts(n)),)), MANIFOLD_SCALES, _split_kromhc, _split_kromhc
    ),
    "mhc": OfficialModule(
        _manifold_shapes(lambda n: (n, 1 + n)), MANIFOLD_SCALES, _split_static_square, _split_dynamic_square
    ),
    "mhc_lite": OfficialModule(
        _manifold_shapes(lambda n: (n + factorial(n),)), MANIFOLD_SCALES, _split_mhc_lite, _split_mhc_lite
    ),
    "hc": OfficialModule(_hc_shapes, HC_SCALES, _split_static_square, _split_shared),
}
