import math

import pytest
import torch
from support import reference

from kromhc_hf.modeling.mixing import doubly_stochastic_error
from kromhc_hf.modeling.variants import VARIANTS, make_mixing
from kromhc_hf.modeling.variants_permutations import prime_factors


EPS = torch.finfo(torch.float32).eps
EXACT = [name for name, kind in VARIANTS.items() if kind.doubly_stochastic == "exactly"]
ALLOWED = [
    *(("kromhc", n) for n in (*range(1, 7), 8, 9, 10, 12, 15, 16, 18, 24, 25, 32)),
    *(("mhc_lite", n) for n in range(1, 7)),
    *(("tbp", n) for n in range(1, 17)),
    *(("identity", n) for n in (1, 2, 3, 7, 16)),
    *(("circulant", n) for n in (*range(1, 9), 16)),
    *(("go_mhc", n) for n in (*range(1, 9), 16)),
]
# One setting per variant and kind of factor, with a matrix that is not symmetric wherever the variant has one.
ASYMMETRIC = [
    *(("kromhc", n) for n in (3, 5, 6)),
    *(("mhc_lite", n) for n in (3, 4)),
    *(("tbp", n) for n in (3, 5)),
    ("mhc", 4),
    ("hc", 4),
    *((variant, n) for variant in ("one_sided", "circulant", "go_mhc", "orthogonal") for n in (3, 4)),
]
SYMMETRIC = [("kromhc", 2), ("kromhc", 4), ("kromhc", 8), ("identity", 4), ("circulant", 2)]


# Rows sum to 1 for any logits, columns need not.
ROWS = [("one_sided", n) for n in (2, 3, 4, 7, 16)]


def label(case: tuple[str, int]) -> str:
    return f"{case[0]}-n{case[1]}"


def random_logits(num_logits: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits of every size up to +-50, extremes included, `[count, num_logits]`."""
    scales = torch.logspace(-1, 1.7, count, dtype=dtype).unsqueeze(-1)
    extremes = 100.0 * torch.randint(0, 2, (count, num_logits)).to(dtype) - 50
    logits = (torch.randn(count, num_logits, dtype=dtype) * scales).clamp(-50, 50)
    return torch.cat([logits, extremes, torch.zeros(1, num_logits, dtype=dtype)])


def bound(variant: str, num_streams: int) -> float:
    """What rounding to fp32 may do: 2 eps per Kronecker factor.

    A dense matrix is summed in float64, then each entry is rounded by at most eps / 2 of itself, and they sum to 1.
    """
    return 2 * len(prime_factors(num_streams)) * EPS if variant == "kromhc" else EPS / 2


@pytest.mark.parametrize("case", ALLOWED, ids=label)
def test_matrices_are_doubly_stochastic(case: tuple[str, int]) -> None:
    mixing = make_mixing(*case)
    matrices = mixing.matrix(random_logits(mixing.num_logits, 200))
    assert matrices.shape[-2:] == (case[1], case[1])
    assert matrices.min() >= 0
    assert doubly_stochastic_error(matrices) <= bound(*case)


def test_every_variant_that_keeps_something_is_tried() -> None:
    assert {variant for variant, _ in ALLOWED} == set(EXACT)
    keeps_rows = {name for name in VARIANTS if make_mixing(name, 2).rows_sum_to_one}
    assert {variant for variant, _ in ROWS} == keeps_rows - set(EXACT)


@pytest.mark.parametrize("case", ROWS, ids=label)
def test_rows_that_are_said_to_sum_to_one_do(case: tuple[str, int]) -> None:
    mixing = make_mixing(*case)
    matrices = mixing.matrix(random_logits(mixing.num_logits, 200))
    assert mixing.rows_sum_to_one
    assert matrices.min() >= 0
    # A softmax over n numbers: exponentials, their sum and a quotient, each rounded.
    assert (matrices.double().sum(-1) - 1).abs().max() <= (case[1] + 2) * EPS
    # Nothing holds the columns.
    assert doubly_stochastic_error(matrices) > 0.5


@pytest.mark.parametrize("num_streams", [2, 3, 4, 7, 16])
def test_rotations_keep_the_length_of_the_streams(num_streams: int) -> None:
    mixing = make_mixing("orthogonal", num_streams)
    matrices = mixing.matrix(random_logits(mixing.num_logits, 200)).double()
    # Solved in float64, then n products of two entries that are each rounded by at most eps / 2 of themselves, whose
    # sizes sum to 1 at most.
    assert (matrices.mT @ matrices - torch.eye(num_streams, dtype=torch.float64)).abs().max() <= 2 * EPS
    # Nothing holds the sums.
    assert doubly_stochastic_error(matrices) > 0.5


def test_a_rotation_starts_at_the_identity_and_learns_from_there() -> None:
    mixing = make_mixing("orthogonal", 4)
    logits = mixing.initial_logits(4.0).requires_grad_()
    matrix = mixing.matrix(logits)
    assert torch.equal(matrix, torch.eye(4))
    # Q = I - 2 A to first order.
    (gradient,) = torch.autograd.grad(matrix[1, 2], logits)
    assert gradient.tolist() == [0, 0, 0, -2, 0, 0]


@pytest.mark.parametrize("residual_logit", [2.0, 4.0, 8.0])
def test_go_mhc_starts_off_the_identity(residual_logit: float) -> None:
    mixing = make_mixing("go_mhc", 4)
    logits = mixing.initial_logits(residual_logit).requires_grad_()
    matrix = mixing.matrix(logits)
    # To first order in that size itself.
    torch.testing.assert_close(
        matrix[0, 1].item(), math.exp(-residual_logit), rtol=2 * math.exp(-residual_logit), atol=0
    )
    (gradient,) = torch.autograd.grad(matrix[0, 1], logits)
    assert gradient.abs().max() > 0.1 * math.exp(-residual_logit / 2)
    # At 0, mixing could not learn.
    zeros = torch.zeros_like(logits, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixing.matrix(zeros)[0, 1], zeros)
    assert not gradient.any()


@pytest.mark.parametrize("case", [*ASYMMETRIC, *SYMMETRIC], ids=label)
def test_matrix_and_mix_agree_with_the_definition(case: tuple[str, int]) -> None:
    variant, n = case
    mixing = make_mixing(variant, n)
    logits = torch.randn(3, mixing.num_logits, dtype=torch.float64) * 2
    streams = torch.randn(3, n, 5, dtype=torch.float64)
    expected = torch.stack([reference.MATRICES[variant](row, n) for row in logits])
    if case in ASYMMETRIC:
        assert (expected - expected.mT).abs().max() > 0.05
    # Float64 sums of at most 120 terms of order 1.
    torch.testing.assert_close(mixing.matrix(logits), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(mixing.mix(streams, logits), expected @ streams, rtol=0, atol=1e-13)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_static_logits_mix_batched_streams(variant: str) -> None:
    mixing = make_mixing(variant, 4)
    logits, streams = torch.randn(mixing.num_logits, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(mixing.mix(streams, logits), mixing.matrix(logits) @ streams, rtol=0, atol=1e-14)


@pytest.mark.parametrize("case", [*(case for case in ALLOWED if case[1] > 1), *ROWS], ids=label)
def test_equal_streams_stay_bitwise_equal(case: tuple[str, int]) -> None:
    mixing = make_mixing(*case)
    logits = random_logits(mixing.num_logits, 20)
    streams = torch.randn(logits.shape[0], 1, 7).expand(-1, case[1], -1)
    assert torch.equal(mixing.mix(streams, logits), streams)


@pytest.mark.parametrize("num_streams", [2, 3, 4, 6, 7, 16])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in EXACT])
def test_initial_matrix_keeps_equal_streams_bitwise(variant: str, num_streams: int) -> None:
    mixing = make_mixing(variant, num_streams)
    streams = torch.randn(64, 1, 7).expand(-1, num_streams, -1)
    for residual_logit in (0.0, 0.7, 4.0, 8.0):
        assert torch.equal(mixing.mix(streams, mixing.initial_logits(residual_logit)), streams)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_initial_logits_lean_towards_the_identity(variant: str) -> None:
    mixing = make_mixing(variant, 4)
    smallest = [mixing.matrix(mixing.initial_logits(logit)).diagonal().min() for logit in (0.0, 2.0, 4.0, 8.0)]
    assert smallest == sorted(smallest)
    assert smallest[-1] > 0.99


@pytest.mark.parametrize("variant", EXACT)
def test_product_over_depth_is_doubly_stochastic(variant: str) -> None:
    mixing = make_mixing(variant, 4)
    product = torch.eye(4).expand(32, 4, 4)
    for _ in range(48):
        product = mixing.matrix(torch.randn(32, mixing.num_logits) * 4) @ product
    # Each factor adds its own error and the rounding of 4-term sums.
    assert doubly_stochastic_error(product) <= 48 * (bound(variant, 4) + 4 * EPS)


def test_sinkhorn_normalises_columns_last_and_rows_only_nearly() -> None:
    mixing, errors = make_mixing("mhc", 4), []
    for deviation in (1, 4, 8):
        matrices = mixing.matrix(torch.randn(4096, 16) * deviation)
        assert (matrices.sum(-2) - 1).abs().max() <= 8 * EPS
        errors.append((matrices.sum(-1) - 1).abs().max().item())
    # Published for single matrices: 4e-4, .067, .185; the maximum depends on the sample.
    assert 1e-5 < errors[0] < 1e-2 < errors[1] < 0.1 < errors[2] < 0.3
    more = make_mixing("mhc", 4, sinkhorn_iterations=200).matrix(torch.randn(256, 16))
    assert doubly_stochastic_error(more) < 1e-5


def test_sinkhorn_error_over_24_branches_is_the_published_one() -> None:
    mixing, product = make_mixing("mhc", 4), torch.eye(4).expand(256, 4, 4)
    for _ in range(24):
        product = mixing.matrix(mixing.initial_logits(8.0) + 2 * torch.randn(256, 16)) @ product
    # About .05, with logits spread around the published initial ones.
    assert 0.03 < (product.sum(-1) - 1).abs().amax(-1).mean() < 0.08


def test_transposed_matrix_is_noticed() -> None:
    # A permutation that is not its own inverse: the definition must send stream 1 to place 0, not the reverse.
    mixing = make_mixing("mhc_lite", 3)
    logits = torch.full((5,), -50.0)
    logits[2] = 50  # (1, 2, 0), the fourth permutation
    streams = torch.tensor([[10.0], [11.0], [12.0]])
    assert mixing.mix(streams, logits).flatten().tolist() == [11.0, 12.0, 10.0]


@pytest.mark.parametrize(
    ("variant", "num_streams", "message"),
    [
        ("kromhc", 0, r"num_streams must be at least 1; got 0\. Use for example num_streams=4"),
        ("tbp", -1, r"num_streams must be at least 1; got -1"),
        ("kromhc", 7, r"no prime factor above 5 .*7! permutation matrices; got 7\. Use num_streams=8"),
        ("kromhc", "4", r"num_streams must be an int; got '4' of type str"),
        ("mhc", True, r"num_streams must be an int; got True of type bool"),
        ("mhc_lite", 7, r"at most 6 with variant 'mhc_lite'.*got 7, which would take 27,164,928 parameters per branch"),
        ("mhc-lite", 4, r"variant must be one of kromhc, identity, mhc, .*; got 'mhc-lite'"),
    ],
)
def test_refusals_name_rule_value_and_way_out(variant: str, num_streams: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mixing(variant, num_streams)


@pytest.mark.parametrize("iterations", [0, 2.5, True])
def test_sinkhorn_iterations_are_checked(iterations: object) -> None:
    with pytest.raises(ValueError, match=r"sinkhorn_iterations must be an int of at least 1; got .*default is 20"):
        make_mixing("mhc", 4, iterations)


def test_doubly_stochastic_error_sees_rows_columns_and_signs() -> None:
    assert doubly_stochastic_error(torch.eye(3)) == 0
    assert doubly_stochastic_error(torch.tensor([[0.5, 0.5], [0.25, 0.75]])) == 0.25
    assert doubly_stochastic_error(torch.tensor([[0.5, 0.25], [0.5, 0.75]])) == 0.25
    assert doubly_stochastic_error(torch.tensor([[1.5, -0.5], [-0.5, 1.5]])) == 0.5
    with pytest.raises(ValueError, match=r"matrix must be square.*got shape \(2, 3\)"):
        doubly_stochastic_error(torch.zeros(2, 3))
