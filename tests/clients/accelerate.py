"""accelerate: `accelerate launch` with a plain training loop on two gloo processes, and a big model dispatched."""

import json
from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, command, same, shown


# A user's script: it knows of the package by one import.
SCRIPT = """
import json, sys, torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
import kromhc_hf

source, target = sys.argv[1:]
accelerator = Accelerator(cpu=True)
model = AutoModelForCausalLM.from_pretrained(source)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))
losses = []
for step in range(3):
    ids = torch.arange(24).view(2, 12)[accelerator.process_index :][:1] + step
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(accelerator.gather(loss.detach()[None]).mean().item())
accelerator.unwrap_model(model).save_pretrained(target, is_main_process=accelerator.is_main_process)
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    assert accelerator.num_processes == 2
    AutoModelForCausalLM.from_pretrained(target)
    json.dump(losses, open(target + "/losses.json", "w"))
"""


def launched(models: Models, work: Path) -> list[float]:
    (work / "train.py").write_text(SCRIPT)
    options = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    launch = ["accelerate", "launch", *options, "--main_process_port", "0"]
    command(*launch, work / "train.py", models.start, work / "out", folder=work)
    return json.loads((work / "out" / "losses.json").read_text())


def agree(base: list[float], converted: list[float]) -> str:
    assert base[0] == converted[0], f"the first loss of the base is {base[0]}, ours {converted[0]}"
    assert converted[-1] < converted[0]
    return f"the first loss of the base; losses {shown(converted)}, of the base {shown(base)}; saved and loaded"


def dispatched(models: Models, work: Path) -> Any:
    """Loaded by accelerate's own reader of checkpoints, with part of the model on disk."""
    import torch
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    import kromhc_hf  # noqa: F401

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models.tuned))
    model.tie_weights()
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.layers.2": "disk"}
    places.update({"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"})
    load_checkpoint_and_dispatch(model, str(models.tuned), device_map=places, offload_folder=str(work / "disk"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = model.eval()(ids).logits
        return (found - AutoModelForCausalLM.from_pretrained(models.tuned)(ids).logits).abs().max().item()


CLIENT = Client(
    tool="accelerate",
    requirements=("accelerate==1.15.0",),
    use="`import kromhc_hf` in the script, then `accelerate launch SCRIPT`.",
    checks=(
        Check("`accelerate launch`, two gloo processes, three steps of SGD", launched, agree),
        Check("`load_checkpoint_and_dispatch` with layers on disk: distance from `from_pretrained`", dispatched, same),
    ),
)
