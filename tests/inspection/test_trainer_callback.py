"""Statistics of the mappings on matrices made by hand, recording on live models, and the Trainer's log."""

import math

import pytest
import torch
from support.runs import CHECKPOINTING, losses, make_trainer, retrofitted
from support.tiny import configurations, make_model, token_ids
from transformers import TrainerCallback

from kromhc_hf import StreamMetricsCallback, record_mappings
from kromhc_hf.inspection.recording import BranchRecord
from kromhc_hf.inspection.statistics import (
    composite_gain,
    effective_num_streams,
    off_identity_mass,
    read_entropy,
    stream_cosine,
    stream_spread,
    stream_statistics,
)


N = 4
IDENTITY = torch.eye(N)
UNIFORM = torch.full((N, N), 1 / N)
SWAP = IDENTITY[[1, 0, 2, 3]]
NAMES = {
    "off_identity_mass",
    "doubly_stochastic_error",
    "read_entropy",
    "stream_spread",
    "stream_cosine",
    "effective_num_streams",
    "forward_gain",
    "backward_gain",
    "gradient_norm",
}


@pytest.mark.parametrize(
    ("h_res", "mass"),
    [
        pytest.param(IDENTITY, 0.0, id="identity"),
        pytest.param(UNIFORM, 0.75, id="uniform"),
        pytest.param(SWAP, 0.5, id="one-swap"),
        pytest.param(-SWAP, 0.5, id="one-swap-negated"),
        pytest.param(torch.stack([IDENTITY, UNIFORM]), 0.375, id="two-tokens"),
    ],
)
def test_off_identity_mass(h_res, mass):
    assert off_identity_mass(h_res).item() == mass


def test_composite_gain_of_doubly_stochastic_matrices_is_one():
    forward, backward = composite_gain([IDENTITY, UNIFORM, SWAP])
    assert forward.tolist() == [1.0, 1.0, 1.0]
    assert backward.tolist() == [1.0, 1.0, 1.0]


def test_composite_gain_goes_forward_by_rows_and_backward_by_columns():
    # Stream 0 receives everything twice: row sums (4, 0), column sums (2, 2).
    gather = torch.tensor([[2.0, 2.0], [0.0, 0.0]])
    # Stream 0 is copied to both: row sums (1, 1), column sums (2, 0).
    copy = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    forward, backward = composite_gain([gather, copy])
    # copy @ gather has rows (2, 2) and (2, 2): row sums 4, column sums 4. The last branch alone is copy.
    assert forward.tolist() == [4.0, 4.0]
    assert backward.tolist() == [4.0, 2.0]


def test_composite_gain_is_the_largest_over_tokens():
    forward, backward = composite_gain([torch.stack([IDENTITY, 3 * IDENTITY])])
    assert forward.tolist() == backward.tolist() == [3.0]


def test_read_entropy():
    assert read_entropy(torch.tensor([0.0, 1.0, 0.0, 0.0])).item() == 0
    assert read_entropy(torch.full((2, 3, N), 0.3)).item() == pytest.approx(math.log(N), rel=1e-6)
    assert read_entropy(torch.tensor([1.0, 1.0, 0.0, 0.0])).item() == pytest.approx(math.log(2), rel=1e-6)


def test_statistics_of_equal_streams():
    streams = torch.randn(2, 3, 1, 8).expand(2, 3, N, 8)
    # The mean of four equal numbers is exact.
    assert stream_spread(streams).item() == 0
    assert stream_cosine(streams).item() == pytest.approx(1, abs=1e-6)
    assert effective_num_streams(streams).item() == pytest.approx(1, abs=1e-6)


def test_statistics_of_orthogonal_streams():
    streams = 5 * torch.eye(N, 8)
    assert stream_cosine(streams).item() == 0
    assert effective_num_streams(streams).item() == pytest.approx(N, rel=1e-6)
    # Four unit vectors and their mean: distance^2 = 1 - 1/4 each.
    assert stream_spread(streams).item() == pytest.approx(math.sqrt(0.75), rel=1e-6)


def test_statistics_of_opposite_and_of_zero_streams():
    streams = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    assert stream_spread(streams).item() == 1
    assert stream_cosine(streams).item() == pytest.approx(-1, abs=1e-6)
    assert effective_num_streams(streams).item() == pytest.approx(1, abs=1e-6)
    for statistic in (stream_spread, stream_cosine, effective_num_streams):
        assert statistic(torch.zeros(3, N, 8)).item() == 0


def test_totals_are_those_of_the_branches():
    streams = torch.eye(N, 8).expand(1, 1, N, 8)
    ones = torch.ones(1, 1, N)
    records = {
        "layers.0.attn_hc": BranchRecord(ones, ones, IDENTITY.expand(1, 1, N, N), streams),
        "layers.0.ffn_hc": BranchRecord(ones, ones, (2 * SWAP).expand(1, 1, N, N), streams),
    }
    statistics = stream_statistics(records)
    assert statistics["off_identity_mass"] == pytest.approx((0 + 1) / 2)
    assert statistics["doubly_stochastic_error"] == 1
    assert statistics["forward_gain"] == statistics["backward_gain"] == 2
    assert statistics["layers.0.attn_hc/forward_gain"] == 1
    assert statistics["layers.0.ffn_hc/off_identity_mass"] == 1
    with pytest.raises(ValueError, match="at least one branch; got none"):
        stream_statistics({})


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_records_are_what_the_branches_computed(model_type):
    model = retrofitted(model_type)
    ids = token_ids(model.config)
    plain = model(ids).logits
    with record_mappings(model) as records:
        assert records == {}
        recorded = model(ids).logits
    assert torch.equal(plain, recorded)
    layers = "h" if model_type == "gpt2" else "layers"
    assert list(records) == [f"{layers}.{i}.{name}" for i in range(3) for name in ("attn_hc", "ffn_hc")]
    for record in records.values():
        assert record.streams.shape == (2, 12, N, 32)
        assert record.h_pre.shape == record.h_post.shape == (2, 12, N)
        assert record.h_res.shape == (2, 12, N, N)
    # At the identity init every branch writes the same to all streams, which start equal.
    assert all(stream_spread(record.streams) == 0 for record in records.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_records_of_a_few_tokens():
    model = retrofitted()
    with record_mappings(model, max_tokens=5) as records:
        model(token_ids(model.config))
    assert {record.streams.shape for record in records.values()} == {(1, 5, N, 32)}


def test_recording_needs_hyper_connections():
    with (
        pytest.raises(ValueError, match="must have hyper-connections; got LlamaForCausalLM"),
        record_mappings(make_model(configurations("llama")[0])),
    ):
        pass


class Reporter(TrainerCallback):
    """Stands for TensorBoard and its like: it sees the logs as they are when its turn comes."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def train(folder, callbacks, **options):
    trainer = make_trainer(folder, retrofitted(), callbacks, **options)
    trainer.train()
    return trainer


def test_metrics_are_in_the_trainers_log(tmp_path):
    # The reporter comes first, as those of report_to do.
    reporter = Reporter()
    trainer = train(tmp_path, [reporter, StreamMetricsCallback(every=2)])
    sampled = [entry for entry in trainer.state.log_history if "hc/off_identity_mass" in entry]
    assert [entry["step"] for entry in sampled] == [1, 3, 5]
    branches = [f"layers.{i}.{name}/" for i in range(3) for name in ("attn_hc", "ffn_hc")]
    wanted = {f"hc/{branch}{name}" for branch in ["", *branches] for name in NAMES}
    for entry in sampled:
        assert {key for key in entry if key.startswith("hc/")} == wanted
        assert all(type(entry[key]) is float and math.isfinite(entry[key]) for key in wanted)
        # Six 4 x 4 matrices of two factors each: 2 K eps per matrix.
        assert abs(entry["hc/forward_gain"] - 1) < 6 * 4 * torch.finfo(torch.float32).eps
        assert entry["hc/gradient_norm"] > 0
    assert sampled[0]["hc/stream_spread"] == 0
    assert sampled[-1]["hc/stream_spread"] > 0
    assert [entry["hc/stream_cosine"] for entry in reporter.seen if "hc/stream_cosine" in entry] == [
        entry["hc/stream_cosine"] for entry in sampled
    ]


def test_totals_alone(tmp_path):
    trainer = train(tmp_path, [StreamMetricsCallback(per_branch=False)], max_steps=1)
    assert {key for key in trainer.state.log_history[0] if key.startswith("hc/")} == {f"hc/{name}" for name in NAMES}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({CHECKPOINTING: True}, id="checkpointing"),
    ],
)
def test_metrics_change_no_loss(tmp_path, options):
    with_metrics = train(tmp_path / "a", [StreamMetricsCallback(every=2)], **options)
    without = train(tmp_path / "b", [], **options)
    assert losses(with_metrics) == losses(without)
    assert "hc/stream_cosine" in with_metrics.state.log_history[0]


def test_callback_needs_hyper_connections(tmp_path):
    trainer = make_trainer(tmp_path, make_model(configurations("llama")[0]), [StreamMetricsCallback()])
    with pytest.raises(ValueError, match="apply_hyper_connections"):
        trainer.train()
    with pytest.raises(ValueError, match="every must be at least 1; got 0"):
        StreamMetricsCallback(every=0)


class HookCounter(TrainerCallback):
    """How many hooks are on the hyper-connections while each step runs."""

    def __init__(self):
        self.hooks = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        modules = [module for name, module in model.named_modules() if name.endswith("_hc")]
        self.hooks.append(sum(len(module._forward_pre_hooks) for module in modules))


def test_steps_between_samples_run_without_hooks(tmp_path):
    """So they cost what they cost without the callback; benchmarks/metrics.py measures the sampled ones."""
    counter = HookCounter()
    train(tmp_path, [StreamMetricsCallback(every=3), counter], max_steps=6, gradient_accumulation_steps=2)
    assert len(counter.hooks) == 6
    assert sum(count > 0 for count in counter.hooks) == 2
    assert StreamMetricsCallback().every >= 20
