"""What tells streams from what they bring along, learning rates chosen per arm, and a user's own comparison."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.connected import tiny_llama
from support.study import DEFAULTS, DEMO_DATA, FROM_SCRATCH, STUDIES

from kromhc_hf import apply_hyper_connections, has_hyper_connections


sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.study import __main__ as command_line
from kromhc_hf.study import training as study_training
from kromhc_hf.study.arm import Arm, StudyError, make_arm
from kromhc_hf.study.comparison import compare, comparison, prepare
from kromhc_hf.study.data import load_corpus, vocabulary_size
from kromhc_hf.study.models import adapted_model, parameter_counts, plain_model, size
from kromhc_hf.study.optimizers import make_optimizers
from kromhc_hf.study.study_file import load_study


def from_scratch(**settings):
    return Arm(**(FROM_SCRATCH | settings))


def logits(arm, rows):
    torch.manual_seed(0)
    model = adapted_model(arm, plain_model(arm, DEMO_DATA)).eval()
    return model(rows).logits, model


def test_branch_scale_is_what_every_branch_adds_times_a_number():
    rows = torch.randint(256, (2, 8))
    plain, model = logits(from_scratch(), rows)
    one, _ = logits(from_scratch(branch_scale=1.0), rows)
    scaled, scaled_model = logits(from_scratch(branch_scale=0.5), rows)
    assert torch.equal(one, plain)
    for layer in model.model.layers:
        for sublayer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            sublayer.weight.data.mul_(0.5)
    assert torch.equal(model(rows).logits, scaled)
    assert parameter_counts(scaled_model)["added"] == 0
    learned, learned_model = logits(from_scratch(branch_scale=1.0, learned_branch_scale=True), rows)
    learned.sum().backward()
    assert parameter_counts(learned_model)["added"] == 4
    (group,) = (
        g
        for g in make_optimizers(from_scratch(hyper_connection_lr=0.5), learned_model)[-1].param_groups
        if g["lr"] == 0.5
    )
    assert [p.shape for p in group["params"]] == [()] * 4
    assert all(p.grad.abs() > 0 for p in group["params"])


def test_branch_scale_is_the_mean_write_weight_of_the_published_init():
    scale = (
        load_study(STUDIES / "d6.yaml", DEMO_DATA, {"text": "tinyshakespeare.txt"})
        .arms["branch scale .769"]
        .branch_scale
    )
    for variant in ("kromhc", "mhc", "identity"):
        model = apply_hyper_connections(tiny_llama(), 4, variant, init="paper", readout="sum")
        h_post = model.model.layers[0].attn_hc.mappings(torch.randn(1, 3, 4, 32)).h_post
        assert h_post.mean().item() == pytest.approx(scale, abs=1e-4)


def test_wider_model_has_as_many_parameters(study_file):
    arms = {"base": {}, "streams": {"variant": "kromhc"}, "wide": {"wider_as": "streams"}}
    study = load_study(study_file(arms=arms, defaults=FROM_SCRATCH), DEMO_DATA)
    base, streams, wide = (size(arm, DEMO_DATA) for arm in study.arms.values())
    # One more unit of the MLP is three vectors in each of two layers.
    assert abs(wide - streams) <= 3 * 16 * 2 / 2 < streams - base
    with pytest.raises(StudyError, match="wider_as must name an arm from scratch that is not made wider itself"):
        load_study(study_file(arms=arms | {"wider": {"wider_as": "wide"}}, defaults=FROM_SCRATCH), DEMO_DATA)


def test_a_model_converted_in_the_middle_goes_on_where_it_was(tmp_path):
    late = from_scratch(variant="kromhc", init="identity", readout="mean", convert_at=0.5, steps=4)
    corpus = load_corpus(late, DEMO_DATA, tmp_path)
    plain = dataclasses.replace(late, variant=None, convert_at=0.0)
    first, other = (study_training.Training(arm, 0, corpus, DEMO_DATA) for arm in (plain, late))
    assert [first.step(), first.step()] == [other.step(), other.step()]
    assert not has_hyper_connections(other.model)
    weight = first.model.model.layers[0].mlp.up_proj.weight
    moments = first.optimizers[-1].state[weight]["exp_avg"].clone()
    other.convert_when_due()
    assert has_hyper_connections(other.model)
    state = other.optimizers[-1].state[other.model.model.layers[0].mlp.up_proj.weight]
    assert torch.equal(state["exp_avg"], moments)
    assert other.held_out_loss() == pytest.approx(first.held_out_loss(), rel=study_training.START_TOLERANCE)
    # The streams are equal as yet, so the step after the conversion still has the loss of the plain model.
    assert other.step() == pytest.approx(first.step(), rel=study_training.START_TOLERANCE)
    assert other.step() != first.step()


def test_muon_trains_the_matrices_and_adamw_the_rest():
    arm = from_scratch(variant="kromhc", optimizer="muon", hyper_connection_lr=5e-3, hyper_connection_betas=[0.8, 0.95])
    _, model = logits(arm, torch.randint(256, (1, 4)))
    muon, adamw = make_optimizers(arm, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    assert by_muon == {n for n in names.values() if "proj" in n}
    rest = [{names[id(p)] for p in group["params"]} for group in adamw.param_groups]
    assert rest[0] == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all("norm" in name for name in rest[1])
    assert all("_hc." in name for name in rest[2])
    assert (adamw.param_groups[2]["lr"], adamw.param_groups[2]["betas"]) == (5e-3, (0.8, 0.95))
    assert len(by_muon) + sum(map(len, rest)) == len(names)


def test_muon_is_refused_where_torch_does_not_have_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(StudyError, match="must have torch 2.9 or newer; got .* Use adamw"):
        make_arm("a", DEFAULTS | {"optimizer": "muon"})


def test_each_arm_gets_the_best_of_its_learning_rates(study_file, command, fast_runs, tmp_path):
    arms = {"base": {"lr_grid": [0.5, 0.25, 1.0]}, "other": {"lr": 0.125}}
    code, out, _ = command(study_file(arms=arms))
    assert code == 0
    # Seed 2 is none of the study's.
    assert fast_runs == [(0.5, 2), (0.25, 2), (1.0, 2), (0.25, 0), (0.125, 0), (0.25, 1), (0.125, 1)]
    assert "| 0.25* |" in out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["arms"]["base"]["settings"]["lr"] == 0.25


def test_a_learning_rate_that_diverges_is_never_the_best(study_file, command, fast_runs, monkeypatch):
    run = study_training.run

    def diverges(arm, *others):
        return run(arm, *others) | ({"validation_loss": float("nan")} if arm.lr == 0.5 else {})

    monkeypatch.setattr(study_training, "run", diverges)
    assert command(study_file(arms={"base": {"lr_grid": [0.5, 0.25, 1.0]}}))[0] == 0
    assert fast_runs[3:] == [(0.25, 0), (0.25, 1)]
    code, _, err = command(study_file(arms={"base": {"lr_grid": [0.5]}}))
    assert (code, fast_runs[5:]) == (2, [])
    assert "training diverged at every learning rate" in err


def test_muon_leaves_positions_to_adamw():
    backbone = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    arm = from_scratch(backbone=backbone, optimizer="muon")
    _, model = logits(arm, torch.randint(256, (1, 4)))
    muon, adamw = make_optimizers(arm, model)
    ends = {id(model.transformer.wpe.weight), id(model.transformer.wte.weight), id(model.lm_head.weight)}
    assert {id(p) for p in adamw.param_groups[0]["params"]} == ends
    assert all(p.dim() == 2 for p in muon.param_groups[0]["params"])


def test_branch_scales_are_where_the_model_is():
    arm = from_scratch(branch_scale=1.0, learned_branch_scale=True)
    model = adapted_model(arm, plain_model(arm, DEMO_DATA).to("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_texts_without_a_tokenizer(tokenizer, tmp_path):
    text = "".join("aäb\n" if index % 3 else "aäbb" for index in range(100))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    arm = from_scratch(tokenizer=tokenizer, text="text.txt", validation_share=0.2, length=10)
    corpus = load_corpus(arm, tmp_path, tmp_path / "cache")
    length = 500 if tokenizer == "bytes" else 400
    assert len(corpus.train) == round(0.7 * length)
    assert vocabulary_size(arm, tmp_path) == (256 if tokenizer == "bytes" else 4)
    assert corpus.validation.shape == corpus.held_out.shape == (2, 10)
    assert not torch.equal(corpus.validation, corpus.held_out)
    if tokenizer == "bytes":
        assert bytes(corpus.train.tolist()) == text.encode()[:350]
        assert corpus.held_out_bytes == 2 * 9
    else:
        assert corpus.train[:5].tolist() == [1, 3, 2, 2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branch_scale": 0.5, "variant": "kromhc"}, "branch_scale is for a plain model"),
        ({"learned_branch_scale": True}, "must have a branch_scale to start from"),
        ({"wider_as": "base"}, "wider_as must have a backbone"),
        ({"convert_at": 0.5}, "convert_at must have a variant with init 'identity'"),
        ({"convert_at": 1.5}, "convert_at must be a share"),
        ({"convert_at": 0.9, "variant": "kromhc"}, "must leave steps before and after .*; got 0.9 of 3 steps"),
        ({"convert_at": 0.1, "variant": "kromhc"}, "must leave steps before and after .*; got 0.1 of 3 steps"),
        ({"hyper_connection_lr": -1.0}, "hyper_connection_lr must be positive; got -1.0"),
        ({"lr": float("nan")}, "lr must be positive; got nan"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"lr_grid": []}, "lr_grid must be at least one"),
        ({"betas": [0.9]}, "betas must be two"),
        ({"held_out_share": 0.5, "validation_share": 0.5}, "must leave some of the text"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon"),
    ],
)
def test_wrong_controls_are_refused(settings, message):
    with pytest.raises(StudyError, match=message):
        make_arm("a", DEFAULTS | settings)


def test_a_rehearsal_of_the_study_for_a_gpu_runs(tmp_path, capsys, monkeypatch):
    shorter = load_study(STUDIES / "d6.yaml", DEMO_DATA, {"text": "tinyshakespeare.txt"})
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    study = yaml.safe_load((STUDIES / "d6.yaml").read_text())
    study["defaults"] |= {"backbone": study["defaults"]["backbone"] | small | {"num_key_value_heads": 2}, "length": 32}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    options = ["--output", str(tmp_path / "out"), "--workers", "1", "--shared", str(DEMO_DATA)]
    assert command_line.main([str(path), *options, "--dry-run", "--text", "tinyshakespeare.txt"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} | 15 |" in out for name in shorter.arms)


def test_comparison_of_a_users_own_checkpoint(tmp_path, capsys):
    model, text = DEMO_DATA / "gpt2-tinystories-1M", DEMO_DATA / "tinyshakespeare.txt"
    settings = {key: DEFAULTS[key] for key in ("length", "batch", "steps", "eval_every", "held_out_windows")}
    study = comparison(str(model), text, ["mhc"], 2, settings)
    assert list(study.arms) == ["no streams", "learned branch scales", "identity", "mhc"]
    out = tmp_path / "out"
    assert prepare(study, out, "cpu") > 0
    summary = compare(study, out, 1, "cpu")
    starts = [arm["initial_loss"] for arm in summary["arms"].values()]
    assert starts == [starts[0]] * 4
    assert all(arm["cost"] is not None for arm in summary["arms"].values())
    assert {"summary.json", "differences.png", "curves.png"} <= {path.name for path in out.iterdir()}
    assert prepare(study, out, "cpu") == 0
    (out / "thesis.txt").touch()
    with pytest.raises(StudyError, match="output must be a new folder, or one of a comparison; .* has thesis.txt"):
        prepare(study, out, "cpu")
    with pytest.raises(StudyError, match="variant must be one of"):
        comparison(str(model), text, ["mch"], 2, settings)
