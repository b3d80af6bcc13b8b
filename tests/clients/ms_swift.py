"""ms-swift: a full fine-tuning by its command."""

import json
from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, command, shown


CHAT = {"messages": [{"role": "user", "content": "Once"}, {"role": "assistant", "content": " upon a time"}]}
OPTIONS = {
    "model_type": "llama",
    "template": "default",
    "tuner_type": "full",
    "torch_dtype": "float32",
    "bf16": "false",
    "fp16": "false",
    "use_cpu": "true",
    "max_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_length": 64,
    "split_dataset_ratio": 0,
    "add_version": "false",
    "report_to": "none",
}


def fine_tuned(models: Models, work: Path) -> list[float]:
    """The losses of its three steps; what it saves loads again with hyper-connections that have moved."""
    from transformers import AutoModelForCausalLM

    (work / "chats.jsonl").write_text(f"{json.dumps(CHAT)}\n" * 8)
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    files = ["--model", models.start, "--dataset", work / "chats.jsonl", "--output_dir", work / "out"]
    command("swift", "sft", *files, *options, folder=work)
    # Imported after the command has shown that it needs no import.
    import kromhc_hf  # noqa: F401

    saved = work / "out" / "checkpoint-3"
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (models.start, saved))
    ours = [name for name in before if "_hc." in name]
    assert set(before) == set(after)
    assert bool(ours) == models.converted
    assert any((after[name] != before[name]).any() for name in ours or before)
    return [entry["loss"] for entry in json.loads((saved / "trainer_state.json").read_text())["log_history"][:3]]


def agree(base: Any, converted: Any) -> str:
    assert converted[0] == base[0], f"the first loss of the base is {base[0]}, ours {converted[0]}"
    return f"the first loss of the base; losses {shown(converted)}, of the base {shown(base)}; saved and loaded"


CLIENT = Client(
    tool="ms-swift",
    requirements=("ms-swift==4.6.0", "transformers<5.20"),
    use="`swift sft --model MODEL --model_type FAMILY --template NAME`, for example `--model_type llama "
    "--template default`: it runs the code beside a model by default, and finds the two by names of classes "
    "that it knows.",
    checks=(Check("`swift sft`, the whole model, three steps", fine_tuned, agree),),
    # Its builds on the index are for another torch than that for CPUs.
    without=("torchvision",),
)
