"""Weights of the authors' own hyper-connection modules, turned into a HyperConnection that computes the same.

Their module differs from ours in form only: its RMS norm has a learned gain (folded into `weight` here), its logits are
redundant (one per permutation; here the identity's is pinned to 0), and it applies its mixing matrix transposed.
"""

from collections.abc import Callable, Mapping
from itertools import permutations
from math import factorial

import torch
from torch import Tensor

from .hyper_connection import HyperConnection
from .mixing import prime_factors


# Their norm divides by max(|x|, 1e-12), ours by sqrt(mean(x^2) + eps): over n * C features this is the same floor.
SMALLEST_NORM_SQUARED = 1e-24

SCALES = ("pre_branch_scale", "h_post_scale", "residual_scale")
TENSORS = ("norm.gamma", "static_alpha", "dynamic_alpha_fn", "static_beta", "dynamic_beta_fn", *SCALES)


def import_reference_state_dict(state_dict: Mapping[str, Tensor], *, variant: str = "kromhc") -> HyperConnection:
    """The HyperConnection with the weights of an official module, in the dtype of its tensors.

    Exact for any parameters, not only initial ones: the outputs agree to rounding (arXiv 2601.21579). A float64 state
    dict gives a module that computes in float64.

    Args:
        state_dict: tensors by the official names, `norm.gamma`, `static_alpha`, `dynamic_alpha_fn`, `static_beta`,
            `dynamic_beta_fn`, `pre_branch_scale`, `h_post_scale`, `residual_scale`, without any prefix.
        variant: which of the official modules they come from.

    Raises:
        ValueError: if the variant cannot be imported, or a tensor is missing, unknown or of a wrong shape.
    """
    if variant not in RESIDUAL_ROWS:
        raise ValueError(f"variant must be one of {', '.join(RESIDUAL_ROWS)} to be imported; got {variant!r}.")
    tensors = _checked(state_dict)
    n = tensors["static_beta"].numel()
    width = tensors["norm.gamma"].numel()
    bias, weight = tensors["static_alpha"], tensors["dynamic_alpha_fn"].T  # [rows], [rows, n * C]
    bias = torch.cat([bias[:n], tensors["static_beta"], RESIDUAL_ROWS[variant](bias[n:], n)])
    weight = torch.cat([weight[:n], tensors["dynamic_beta_fn"].T, RESIDUAL_ROWS[variant](weight[n:], n)])

    module = HyperConnection(width // n, n, variant=variant, eps=SMALLEST_NORM_SQUARED / width).to(bias.dtype)
    with torch.no_grad():
        module.bias.copy_(bias)
        module.weight.copy_(weight * (1 + tensors["norm.gamma"]))
        module.alpha.copy_(torch.stack([tensors[name].reshape(()) for name in SCALES]))
    return module


def _checked(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    missing, unknown = set(TENSORS) - set(state_dict), set(state_dict) - set(TENSORS)
    if missing or unknown:
        raise ValueError(
            f"state_dict must hold exactly the tensors {', '.join(TENSORS)}; "
            f"missing: {', '.join(sorted(missing)) or 'none'}; unknown: {', '.join(sorted(unknown)) or 'none'}. "
            "Strip the prefix of the module, and pass the tensors of one module only."
        )
    return state_dict


def _kromhc_rows(rows: Tensor, num_streams: int) -> Tensor:
    """One row per permutation of each factor -> one per permutation but the identity, relative to the identity's."""
    factors = prime_factors(num_streams)
    if rows.shape[0] != sum(map(factorial, factors)):
        raise ValueError(
            f"the residual logits of {num_streams} streams must be {sum(map(factorial, factors))}, i! for each prime "
            f"factor i; got {rows.shape[0]}. Import modules whose factors are the prime factors in ascending order."
        )
    return torch.cat(
        [_relative(part, size) for part, size in zip(rows.split([factorial(size) for size in factors]), factors)]
    )


def _relative(rows: Tensor, size: int) -> Tensor:
    """Logits of all permutations -> relative to the identity's, which drops out; transposed, as theirs are applied."""
    orders = list(permutations(range(size)))
    inverse = [orders.index(tuple(sorted(range(size), key=order.__getitem__))) for order in orders]
    return rows[inverse[1:]] - rows[:1]


# From the official rows for the residual logits, biases and weights alike, to ours.
RESIDUAL_ROWS: dict[str, Callable[[Tensor, int], Tensor]] = {"kromhc": _kromhc_rows}
