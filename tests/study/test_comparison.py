"""What a comparison goes on with, what it leaves alone, and what it refuses before anything is trained."""

import dataclasses
import json
import shutil

import pytest
import torch
from support.study import DEFAULTS, DEMO_DATA

from kromhc_hf.study import cost, data
from kromhc_hf.study.arm import Arm, StudyError
from kromhc_hf.study.comparison import compare, comparison, prepare
from kromhc_hf.study.data import load_corpus
from kromhc_hf.study.report import table
from kromhc_hf.study.runs import execute, results
from kromhc_hf.study.statistics import MOST_SEEDS


SETTINGS = {key: DEFAULTS[key] for key in ("length", "batch", "steps", "eval_every", "held_out_windows")}


@pytest.fixture
def own(tmp_path):
    """A user's folder with a model and a text of theirs."""
    shutil.copytree(DEMO_DATA / DEFAULTS["model"], tmp_path / "model")
    shutil.copy(DEMO_DATA / DEFAULTS["text"], tmp_path / "text.txt")
    return tmp_path


@pytest.fixture
def compared(own):
    """A comparison of them: `compared(seeds=1, steps=3)`."""

    def make(seeds=1, variants=(), **settings):
        return comparison(str(own / "model"), own / "text.txt", variants, seeds, SETTINGS | settings)

    return make


@pytest.mark.parametrize("file", ["text.txt", "model/model.safetensors", "model/tokenizer.json"])
def test_runs_of_files_that_have_changed_are_not_taken_for_new_ones(file, own, compared, fast_runs):
    study, out = compared(), own / "out"
    execute(study, out, own, 1)
    assert all(results(study, out, own).values())
    content = bytearray((own / file).read_bytes())
    content[-3:-1] = b"  "
    (own / file).write_bytes(content)
    assert not any(results(study, out, own).values())
    with pytest.raises(StudyError, match="has runs that differ in the files that these name, .* Use another folder"):
        prepare(study, out, "cpu")


def test_runs_of_another_comparison_are_not_replaced(own, compared, fast_runs):
    out = own / "out"
    execute(compared(), out, own, 1)
    before = {path: path.read_bytes() for path in (out / "runs").iterdir()}
    with pytest.raises(StudyError, match="has runs that differ in steps, and they would be replaced"):
        prepare(compared(steps=4), out, "cpu")
    with pytest.raises(StudyError, match="differ in lr"):
        prepare(compared(lr=0.5), out, "cpu")
    # More seeds and more variants go on.
    assert prepare(compared(seeds=2, variants=["kromhc"]), out, "cpu") > 0
    assert {path: path.read_bytes() for path in (out / "runs").iterdir()} == before


def test_one_seed_alone_tells_nothing(own, compared, fast_runs):
    summaries = []
    for seeds in (1, 2):
        summaries.append(compare(compared(seeds=seeds, variants=["mhc"]), own / "out", 1, "cpu"))
    rows = [table(summary).splitlines() for summary in summaries]
    one, two = ([row.split(" | ")[8] for row in lines if row.startswith("| mhc ")] for lines in rows)
    assert (one, two) == ([""], ["no"])


def test_a_chosen_learning_rate_is_no_other_comparison(own, compared, fast_runs):
    out, grid = own / "out", {"lr_grid": [0.5, 0.25], "lr": 0.5}
    study = compared(**grid)
    execute(compared(**grid | {"lr": 0.25}), out, own, 1)
    assert prepare(study, out, "cpu") >= 0


def test_more_seeds_go_on_with_the_learning_rates_that_were_chosen(own, compared, fast_runs):
    out, grid = own / "out", {"lr_grid": [0.5, 0.25], "lr": 0.5}
    compare(compared(seeds=1, **grid), out, 1, "cpu")
    before = {path: path.read_bytes() for path in (out / "runs").iterdir()}
    fast_runs.clear()
    compare(compared(seeds=2, **grid), out, 1, "cpu")
    assert fast_runs == [(0.25, 1)] * 3
    assert before.items() < {path: path.read_bytes() for path in (out / "runs").iterdir()}.items()
    most = compared(seeds=MOST_SEEDS)
    assert most.tuning_seed not in most.seeds


def test_runs_at_another_learning_rate_than_the_chosen_one_are_not_replaced(own, compared, fast_runs):
    out, grid = own / "out", {"lr_grid": [0.5, 0.25], "lr": 0.5}
    study = compared(**grid)
    execute(study, out, own, 1)
    before = {path: path.read_bytes() for path in (out / "runs").iterdir()}
    with pytest.raises(StudyError, match="has runs that differ in lr, and they would be replaced"):
        compare(study, out, 1, "cpu")
    assert before.items() <= {path: path.read_bytes() for path in (out / "runs").iterdir()}.items()


def test_learning_rates_are_not_chosen_on_the_windows_that_are_reported(own, compared, tmp_path):
    (arm, *_) = compared(lr_grid=[0.5, 0.25]).arms.values()
    corpus = load_corpus(arm, own, tmp_path / "tokens")
    assert not torch.equal(corpus.validation, corpus.held_out)
    plain = load_corpus(next(iter(compared().arms.values())), own, tmp_path / "tokens")
    assert torch.equal(plain.held_out, corpus.held_out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 32}, "seeds must be from 1 to 31; got 32"),
        ({"variants": ["kromhc", ""]}, "variants must be names with commas between; got 'kromhc, '"),
        ({"length": 257}, "length must be at most 256, the context of the model; got 257"),
    ],
)
def test_wrong_comparisons_are_refused(changes, message, compared):
    with pytest.raises(StudyError, match=message):
        compared(**changes)


def test_adapters_are_refused(own, compared):
    (own / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="adapter"):
        compared()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2ForSequenceClassification"]},
            "causal language model, .* is one of AutoModelForSequenceClassification",
        ),
        ({"model_type": "kromhc_gpt2"}, "has been converted already"),
        ({"model_type": "t5"}, "supported families; got 't5'"),
        ({"add_cross_attention": True}, "without cross-attention"),
    ],
)
def test_models_that_cannot_be_compared_are_refused(changes, message, own, compared):
    path = own / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        compared()


def test_a_text_or_a_tokenizer_that_will_not_do_leaves_no_folder(own, compared):
    study, text = compared(), (own / "text.txt").read_text()
    (own / "text.txt").write_text(text[:200])
    with pytest.raises(StudyError, match="must have 2 held-out windows of 16 tokens"):
        prepare(study, own / "out", "cpu")
    (own / "text.txt").write_text(text)
    (own / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(StudyError, match="must have a tokenizer beside it"):
        prepare(study, own / "out", "cpu")
    assert not (own / "out").exists()


def test_costs_are_measured_once_on_a_machine(own, compared, monkeypatch):
    study, out = compared(), own / "out"
    prepare(study, out, "cpu")
    before = (out / "cost.json").read_bytes()
    assert prepare(study, out, "cpu") > 0
    assert (out / "cost.json").read_bytes() == before
    # Evaluations take their time as well.
    longer = {name: dataclasses.replace(arm, eval_every=1) for name, arm in study.arms.items()}
    assert prepare(dataclasses.replace(study, arms=longer), out, "cpu") > prepare(study, out, "cpu")
    monkeypatch.setattr(cost, "device_name", lambda device: "another machine")
    prepare(study, out, "cpu")
    assert json.loads((out / "cost.json").read_text())["machine"]["device"] == "another machine"


def test_runs_of_another_kind_of_device_are_not_taken_for_new_ones(own, compared, fast_runs):
    study, out = compared(), own / "out"
    execute(study, out, own, 1)
    for path in (out / "runs").iterdir():
        path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "cuda"}))
    with pytest.raises(StudyError, match="the folder has some on cuda, and device is cpu"):
        prepare(study, out, "cpu")
    with pytest.raises(StudyError, match="the folder has some on cuda"):
        execute(study, out, own, 1)


def test_tokens_that_were_half_written_are_not_read(tmp_path, monkeypatch):
    save = data.torch.save

    def interrupted(content, path):
        save(content, path)
        raise KeyboardInterrupt

    arm = Arm(**DEFAULTS)
    monkeypatch.setattr(data.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(arm, DEMO_DATA, tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_a_tokenizer_of_several_files_will_do(own, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(own / "model")
    tokenizer.backend_tokenizer.model.save(str(own / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own / "model" / name).unlink()
    arm = Arm(**DEFAULTS | {"model": "model", "text": "text.txt"})
    assert load_corpus(arm, own, tmp_path / "tokens").held_out_bytes > 0


def test_a_text_that_is_no_utf8_is_named(own):
    (own / "text.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(StudyError, match=r"the text must be UTF-8; .*text\.txt is not"):
        load_corpus(Arm(**DEFAULTS | {"model": "model", "text": "text.txt"}), own, own / "tokens")
