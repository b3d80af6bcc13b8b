"""What the runs of a study say: means, standard errors, paired differences, and whether two studies agree."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


# Two-sided 95 % quantile of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
MOST_SEEDS = len(T_QUANTILES) + 1
# Nats per token: another processor adds in another order, and training amplifies that.
ROUNDING = 1e-4


class Estimate(NamedTuple):
    """A mean over seeds with its standard error, which is None for a single seed."""

    mean: float
    standard_error: float | None
    seeds: int

    @property
    def half_width(self) -> float | None:
        """Half of the 95 % confidence interval."""
        return None if self.standard_error is None else T_QUANTILES[self.seeds - 2] * self.standard_error

    @property
    def separates(self) -> bool:
        """Whether the mean is not 0 at 95 % confidence; of 20 arms without any effect, one is expected to."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return Estimate(statistics.fmean(values), error, len(values))


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate:
    """Of an arm to another, seed by seed: both saw the same batches, so what the batches did to both drops out."""
    return estimate([values[seed] - reference[seed] for seed in values])


class Agreement(NamedTuple):
    """One arm's number here and in the published summary, and how far apart they may be."""

    arm: str
    quantity: str
    here: float
    published: float
    allowed: float

    @property
    def apart(self) -> float:
        return abs(self.here - self.published)

    @property
    def holds(self) -> bool:
        return self.apart <= self.allowed


def agreements(summary: Mapping[str, Any], published: Mapping[str, Any]) -> list[Agreement]:
    """Compares the paired differences of two summaries, and the mean loss of the arms that are compared with nothing.

    Two estimates agree if they are within t * sqrt(SE_1^2 + SE_2^2), t for the smaller number of seeds.

    Raises:
        ValueError: if an arm of the summary was not published.
    """
    missing = set(summary["arms"]) - set(published["arms"])
    if missing:
        raise ValueError(
            f"the published summary must have every arm of the study; it lacks {', '.join(sorted(missing))}. "
            "Compare with the summary of the same study file."
        )
    found = []
    for name, arm in summary["arms"].items():
        other = published["arms"][name]
        quantity = "final_loss" if arm["difference"] is None or other["difference"] is None else "difference"
        here, there = Estimate(**arm[quantity]), Estimate(**other[quantity])
        allowed = ROUNDING
        if here.standard_error is not None and there.standard_error is not None:
            t = T_QUANTILES[min(here.seeds, there.seeds) - 2]
            allowed += t * (here.standard_error**2 + there.standard_error**2) ** 0.5
        found.append(Agreement(name, quantity, here.mean, there.mean, allowed))
    return found
