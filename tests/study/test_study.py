"""The study runner of the benchmarks: its statistics, its pairing, its resumption, and what it refuses."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from support.connected import tiny_llama
from support.study import DEFAULTS, DEMO_DATA, STUDIES

from kromhc_hf import apply_hyper_connections


sys.path.append(str(Path(__file__).resolve().parents[2]))
from kromhc_hf.study import runs as study_runs
from kromhc_hf.study import training as study_training
from kromhc_hf.study.arm import Arm, StudyError
from kromhc_hf.study.cost import at_equal_time, cost_settings, measure_costs, read_costs
from kromhc_hf.study.data import batches, load_corpus
from kromhc_hf.study.models import write_unequally
from kromhc_hf.study.optimizers import learning_rate
from kromhc_hf.study.statistics import agreements, estimate, paired_difference
from kromhc_hf.study.study_file import load_study


def test_statistics_of_hand_made_numbers():
    found = estimate([1.0, 2.0, 3.0, 4.0])
    assert found.mean == 2.5
    assert found.standard_error == pytest.approx((5 / 3 / 4) ** 0.5)
    assert found.half_width == pytest.approx(3.182 * 0.6454972)
    assert found.separates
    # Differences 1, 1, 4: mean 2, variance 3, standard error 1, and t(2) = 4.303.
    difference = paired_difference({0: 11.0, 1: 21.0, 2: 34.0}, {0: 10.0, 1: 20.0, 2: 30.0})
    assert difference == (2.0, pytest.approx(1.0), 3)
    assert not difference.separates
    alone = estimate([5.0])
    assert (alone.mean, alone.standard_error, alone.half_width, alone.separates) == (5.0, None, None, False)


def test_agreement_of_hand_made_numbers():
    def summary(mean):
        difference = {"mean": mean, "standard_error": 0.03, "seeds": 5}
        loss = {"mean": 2.0, "standard_error": 0.04, "seeds": 5}
        return {
            "arms": {"a": {"difference": difference, "final_loss": loss}, "b": {"difference": None, "final_loss": loss}}
        }

    arm, reference = agreements(summary(0.1), summary(0.2))
    # t(4) = 2.776 and two standard errors of .03, beside the rounding of 1e-4.
    assert arm.allowed == pytest.approx(2.776 * 0.03 * 2**0.5 + 1e-4)
    assert arm.holds
    assert reference.quantity == "final_loss"
    assert not agreements(summary(0.1), summary(0.3))[0].holds
    with pytest.raises(ValueError, match="every arm of the study; it lacks b"):
        agreements(summary(0.1), {"arms": {"a": summary(0.1)["arms"]["a"]}})


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    shares = [learning_rate(Arm(steps=100), step) for step in range(101)]
    assert shares[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert max(shares) == 1
    assert shares[100] == pytest.approx(0.1)


def test_batches_are_paired_by_seed():
    tokens = torch.arange(1000)
    first, second, other = (batches(tokens, 8, 4, seed) for seed in (0, 0, 1))
    for _ in range(3):
        rows = next(first)
        assert torch.equal(rows, next(second))
        assert not torch.equal(rows, next(other))


def test_held_out_windows_are_counted_in_bytes(tmp_path):
    from transformers import AutoTokenizer

    arm = Arm(**DEFAULTS)
    corpus = load_corpus(arm, DEMO_DATA, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_DATA / "gpt2-tinystories-1M")
    text = "".join(tokenizer.decode(row) for row in corpus.held_out[:, 1:])
    assert corpus.held_out.shape == (2, 16)
    assert corpus.held_out_bytes == len(text.encode())
    with pytest.raises(StudyError, match="Use fewer or shorter ones, or a longer text"):
        load_corpus(dataclasses.replace(arm, held_out_windows=10**6), DEMO_DATA, tmp_path)


@pytest.mark.parametrize("variant", ["kromhc", "identity", "tbp", "mhc_lite"])
def test_unequal_writes_start_at_the_loss_of_the_base(variant):
    rows = torch.randint(99, (4, 16))
    model = tiny_llama().eval()
    base = model(rows).logits
    write_unequally(apply_hyper_connections(model, 4, variant, residual_logit=2.0))
    first, second = (model.model.layers[0].attn_hc, model.model.layers[0].ffn_hc)
    h_post = first.mappings(torch.randn(1, 1, 4, 32)).h_post[0, 0]
    assert h_post.tolist() == pytest.approx([1.5, 7 / 6, 5 / 6, 0.5])
    assert torch.equal(second.bias[4:8], first.bias[4:8].roll(1))
    # Sums of n = 4 streams in another order, over 6 branches.
    torch.testing.assert_close(model(rows).logits, base, rtol=1e-5, atol=1e-5)


def test_small_study_from_end_to_end(study_file, command, tmp_path):
    arms = {
        "base": {},
        "streams": {"variant": "kromhc", "symmetry_breaking": "unequal_writes"},
        "alone": {"variant": "kromhc", "trained": "hyper_connections", "readout": "softmax"},
    }
    code, out, _ = command(study_file(arms=arms, seeds=2))
    assert code == 0
    assert "| streams | 3 |" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    base, streams, alone = summary["arms"].values()
    assert streams["initial_loss"] == pytest.approx(base["initial_loss"], rel=study_training.START_TOLERANCE)
    assert alone["initial_loss"] == base["initial_loss"]
    assert alone["trainable"] == alone["added"] < base["trainable"] < streams["trainable"]
    assert streams["curve"]["steps"] == [0, 2, 3]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"curves.png", "differences.png"}


def test_models_from_scratch_start_with_the_same_backbone(tmp_path):
    backbone = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {**DEFAULTS, "model": None, "backbone": backbone, "tokenizer": "gpt2-tinystories-1M"}
    arm = Arm(**settings, init="paper", readout="sum")
    corpus = load_corpus(arm, DEMO_DATA, tmp_path)
    plain, streams, other = (
        study_training.Training(dataclasses.replace(arm, variant=variant), seed, corpus, DEMO_DATA)
        for variant, seed in ((None, 0), ("kromhc", 0), ("kromhc", 1))
    )
    weights = dict(streams.model.named_parameters())
    assert all(torch.equal(weights[name], p) for name, p in plain.model.named_parameters())
    assert not torch.equal(weights["lm_head.weight"], other.model.lm_head.weight)
    assert streams.step() > 0


def test_finished_runs_are_not_done_again(study_file, command, fast_runs):
    arms = {"base": {}, "lower": {"lr": 0.5}}
    assert command(study_file(arms=arms))[0] == 0
    assert fast_runs == [(0.001, 0), (0.5, 0), (0.001, 1), (0.5, 1)]
    assert command(study_file(arms=arms, seeds=3))[0] == 0
    assert fast_runs[4:] == [(0.001, 2), (0.5, 2)]
    arms["lower"]["lr"] = 0.25
    assert command(study_file(arms=arms, seeds=3))[0] == 0
    assert fast_runs[6:] == [(0.25, 0), (0.25, 1), (0.25, 2)]


def test_interrupted_study_goes_on(study_file, command, fast_runs, monkeypatch, tmp_path):
    finish, arms = study_runs.write_atomically, {"base": {}, "lower": {"lr": 0.5}}

    def interrupt(path, content):
        if len(fast_runs) == 3:
            path.with_suffix(".partial").write_text("{")
            raise KeyboardInterrupt
        finish(path, content)

    monkeypatch.setattr(study_runs, "write_atomically", interrupt)
    code, _, err = command(study_file(arms=arms))
    assert code == 130
    assert "the same command goes on" in err
    monkeypatch.setattr(study_runs, "write_atomically", finish)
    assert command(study_file(arms=arms))[0] == 0
    assert fast_runs[3:] == [(0.001, 1), (0.5, 1)]


def test_compare_fails_where_a_published_number_is_shifted(study_file, command, fast_runs, tmp_path):
    path = study_file(arms={"base": {}, "streams": {"variant": "kromhc"}}, seeds=3)
    assert command(path)[0] == 0
    published = json.loads((tmp_path / "out" / "summary.json").read_text())
    file = tmp_path / "published.json"
    file.write_text(json.dumps(published))
    code, out, _ = command(path, "--compare", str(file))
    assert code == 0
    assert "NO" not in out
    published["arms"]["streams"]["difference"]["mean"] += 0.01
    file.write_text(json.dumps(published))
    code, out, _ = command(path, "--compare", str(file))
    assert code == 1
    assert "| streams | difference | 0.0010 | 0.0110 |" in out
    assert "nothing.json" in command(path, "--compare", "nothing.json")[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"base": {}, "a": {"ratio": 3}}}, "got ratio. The keys are against, backbone"),
        ({"arms": {"base": {}, "a": {"variant": "khc"}}}, "variant must be one of kromhc, .*; got 'khc'"),
        ({"arms": {"base": {}, "a": {"lr": "3e-3"}}}, "lr must be of type float; got '3e-3'. .* 3.0e-4"),
        ({"arms": {"base": {"steps": 0}}}, "steps must be positive; got 0. The default is 250"),
        ({"arms": {"base": {"trained": "lora"}}}, "lora_rank must be given with LoRA, at least 1; got None"),
        ({"arms": {"base": {"trained": "hyper_connections"}}}, "must have a variant; got None"),
        (
            {"arms": {"base": {"model": "gpt3"}}},
            "model must be in the shared folder; .*gpt3 is not there. Use",
        ),
        ({"arms": {"base": {"variant": "mhc", "symmetry_breaking": "unequal_writes"}}}, "Use peaked_reads"),
        ({"arms": {"base": {"equal_time": True}, "a": {"variant": "kromhc", "equal_time": True}}}, "--measure-cost"),
        ({"arms": {"base": {"variant": "kromhc", "readout": "sum"}}}, "Use readout='mean', or init='paper'"),
        ({"arms": {"base": 3}}, "'base' must be a mapping from keys to values; got 3"),
        ({"arms": {}}, "arms must be a mapping from names to settings"),
        ({"reference": "plain"}, "must name arms of the study; got 'plain'. The arms are base"),
        (
            {"arms": {"base": {}, "a": {"equal_time": True}, "b": {"equal_time": True, "against": "a"}}},
            "equal_time must be against an arm whose steps .* not cut themselves; got 'a'",
        ),
        ({"arms": {"base": {}, "lr 1": {}, "LR_1": {}}}, "names that differ as those of files; got 'lr 1' and 'LR_1'"),
        ({"seeds": 0}, "seeds must be a number from 1 to 31"),
        ({"colour": "red"}, "study must have known keys alone; got colour"),
    ],
)
def test_wrong_studies_start_nothing(changes, message, study_file, command, fast_runs, tmp_path):
    code, out, err = command(study_file(**changes))
    assert (code, out, fast_runs) == (2, "", [])
    assert "error: " in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


def test_equal_time_shortens_the_schedule_by_the_measured_cost(study_file, tmp_path):
    arms = {"base": {"steps": 300}, "streams": {"variant": "kromhc", "equal_time": True}}
    study = load_study(study_file(arms=arms), DEMO_DATA)
    with pytest.raises(StudyError, match="Run with --measure-cost first"):
        at_equal_time(study, read_costs(study, tmp_path))
    settings = [cost_settings(study.arms[name]) for name in ("streams", "base")]
    entry = {"arm": "streams", "against": "base", "times": 1.5, "settings": settings}
    (tmp_path / "cost.json").write_text(json.dumps({"costs": [entry]}))
    costs = read_costs(study, tmp_path)
    assert costs == {"base": 1.0, "streams": 1.5}
    shortened = at_equal_time(study, costs)
    assert (shortened.arms["base"].steps, shortened.arms["streams"].steps) == (300, 200)


def test_arms_that_convert_in_the_middle_have_no_cost(study_file, tmp_path):
    arms = {"base": {}, "late": {"variant": "kromhc", "convert_at": 0.5}}
    study = load_study(study_file(arms=arms), DEMO_DATA)
    measure_costs(study, tmp_path / "out", DEMO_DATA, 1)
    assert read_costs(study, tmp_path / "out") == {"base": 1.0}


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_published_studies_are_valid(path, shared):
    # The text of the study for a GPU is for its user to fetch.
    changes = {"text": "text/tinyshakespeare/input.txt"} if path.stem == "d6" else {}
    assert load_study(path, shared, changes).arms
