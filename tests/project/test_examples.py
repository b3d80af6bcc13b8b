"""Every example in a short mode, offline on the embedded model; its result loads and gives the loss that it printed."""

import argparse
import os
import random
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from kromhc_hf import KromHCForCausalLM, KromHCForImageTextToText


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = ["--steps", "3", "--batch", "2"]
LENGTH = ["--length", "64"]
COMMANDS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


class Recorded(argparse.Namespace):
    """Options that remember which of them have been read."""

    def __getattribute__(self, name):
        object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return super().__getattribute__(name)

    def unread(self) -> set[str]:
        given = object.__getattribute__(self, "__dict__")
        return set(given) - given["_read"] - {"_read"}


def printed(output: str) -> tuple[float, float, Path]:
    """The losses before and after, and the folder, from the last two lines of an example."""
    losses = re.search(r"^held-out loss ([\d.]+) -> ([\d.]+) nats per token$", output, re.MULTILINE)
    result = re.search(r"^result in (.+)$", output, re.MULTILINE)
    assert losses is not None, output[-2000:]
    assert result is not None, output[-2000:]
    return float(losses[1]), float(losses[2]), Path(result[1])


def run_example(name: str, folder: Path, monkeypatch, capsys, *more: str) -> tuple[float, float, Path]:
    """Runs an example in this process, where the libraries are imported already; it must read all of its options."""
    parse, parsed = argparse.ArgumentParser.parse_args, []

    def recorded(parser, args=None, namespace=None):
        if args is not None or namespace is not None:
            return parse(parser, args, namespace)
        parsed.append(Recorded(**vars(parse(parser))))
        return parsed[-1]

    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", recorded)
    monkeypatch.setattr(sys, "argv", [name, *SHORT, *more, "--output", str(folder)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    (options,) = parsed
    assert not options.unread()
    return printed(capsys.readouterr().out)


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_are_documented_are_the_options(monkeypatch, capsys, name):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    path = EXAMPLES / f"{name}.py"
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    options = set(re.findall(r"^  --([\w-]+)", capsys.readouterr().out, re.MULTILINE))
    source = path.read_text(encoding="utf-8")
    shown = re.findall(rf"^ *(?:python|torchrun .*) examples/{name}\.py (.*)$", source, re.MULTILINE)
    assert set(re.findall(r"--([\w-]+)", " ".join(shown))) <= options
    # What two ranks do with their options cannot be recorded here.
    if name == "fsdp2":
        assert {option.replace("-", "_") for option in options} <= set(re.findall(r"options\.(\w+)", source))
    if name != "nanogpt":
        page = " ".join((EXAMPLES.parent / "docs" / "training.md").read_text(encoding="utf-8").split())
        sentences = r"All take (.*?)\. `lora_sft.py` also takes (.*?), `images.py` (.*?), the others (.*?)\."
        ((common, lora, images, others),) = re.findall(sentences, page)
        documented = common + {"lora_sft": lora, "images": images}.get(name, others)
        assert set(re.findall(r"`--([\w-]+)`", documented)) == options


@pytest.mark.parametrize(("option", "value"), [("--text", "nowhere.txt"), ("--model", "nowhere")])
def test_options_are_checked_before_anything_is_loaded(monkeypatch, capsys, option, value):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["retrofit.py", option, value])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / "retrofit.py"), run_name="__main__")
    assert f"argument {option}: " in capsys.readouterr().err


def held_out_loss(model, tokenizer, monkeypatch) -> float:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from scaffold import TEXT, Windows

    windows = Windows(tokenizer, str(TEXT), 64, held_out=True).windows
    with torch.no_grad():
        return model.eval()(input_ids=windows, labels=windows).loss.item()


@pytest.mark.parametrize("name", ["retrofit", "pretrain"])
def test_full_training_examples(tmp_path, monkeypatch, capsys, name):
    before, after, folder = run_example(name, tmp_path / "result", monkeypatch, capsys, *LENGTH)
    assert after < before
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, KromHCForCausalLM)
    assert model.config.hc_init == ("identity" if name == "retrofit" else "paper")
    # Printed with four digits; batches of eight and of 64 sum in another order.
    assert held_out_loss(model, AutoTokenizer.from_pretrained(folder), monkeypatch) == pytest.approx(after, abs=1e-4)
    if name == "retrofit":
        monkeypatch.syspath_prepend(str(EXAMPLES))
        from scaffold import MODEL

        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        assert held_out_loss(base, AutoTokenizer.from_pretrained(folder), monkeypatch) == pytest.approx(
            before, abs=1e-4
        )


def test_adapter_example(tmp_path, monkeypatch, capsys):
    before, after, folder = run_example("train_hyper_connections", tmp_path / "result", monkeypatch, capsys, *LENGTH)
    assert after != before
    assert (folder / "adapter_model.safetensors").stat().st_size < 1e6
    assert not (folder / "model.safetensors").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
    assert held_out_loss(model, tokenizer, monkeypatch) == pytest.approx(after, abs=1e-4)


def test_lora_example(tmp_path, monkeypatch, capsys):
    # A few rows of a user's own.
    rows = (EXAMPLES / "instructions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    (tmp_path / "own.jsonl").write_text("".join(rows), encoding="utf-8")
    more = [*LENGTH, "--instructions", str(tmp_path / "own.jsonl")]
    before, after, folder = run_example("lora_sft", tmp_path / "result", monkeypatch, capsys, *more)
    assert after < before
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.get_base_model(), KromHCForCausalLM)
    prompt = AutoTokenizer.from_pretrained(folder)("Who was at the park with Tim?\n", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 5


@pytest.mark.parametrize("trainer", ["trainer", "sft"])
def test_image_example(tmp_path, monkeypatch, capsys, trainer):
    before, after, folder = run_example("images", tmp_path / "result", monkeypatch, capsys, "--trainer", trainer)
    assert after < before
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert isinstance(model, KromHCForImageTextToText)
    from images import draw, pairs

    assert len(pairs(seed=0)) == len({row["completion"][0]["content"] for row in pairs(seed=0)}) == 18
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
    text = processor.apply_chat_template(chat)
    logits = []
    for color in ("red", "blue"):
        inputs = processor(text=text, images=[draw(color, "disc", random.Random(0))], return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    assert not torch.equal(*logits)


def test_fsdp2_example_on_two_ranks(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, EXAMPLES / "fsdp2.py", *SHORT, *LENGTH, "--output", tmp_path / "result"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr[-4000:]
    before, after, folder = printed(run.stdout)
    assert after < before
    assert run.stdout.count("result in") == 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, KromHCForCausalLM)
    assert model.transformer.h[0].attn_hc.alpha.dtype is torch.float32


def test_instruction_file_is_well_formed():
    import json

    rows = [json.loads(line) for line in (EXAMPLES / "instructions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 50
    assert all(
        set(row) == {"prompt", "completion"} and row["prompt"].endswith("\n") and row["completion"] for row in rows
    )
    assert len({row["prompt"] for row in rows}) == len(rows)
