"""accelerate: a model loaded by its own reader of checkpoints, and training by its launcher.

As a program it is the script that is launched.
"""

import json
import sys
from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, command, same, shown


STEPS, BATCH, LENGTH = 3, 4, 32


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


def launched(models: Models, work: Path) -> dict[str, list[float]]:
    """The losses of two processes, those of one with the same batches, and what the two save loads again."""
    from transformers import AutoModelForCausalLM

    import kromhc_hf  # noqa: F401

    found = {}
    # A launcher for one process is told of CPUs; that for many takes GPUs for granted.
    for name, variables, options in (
        ("two processes", {"ACCELERATE_USE_CPU": "true"}, ("--multi_gpu", "--num_processes", 2)),
        ("one process", {}, ("--cpu", "--num_processes", 1)),
    ):
        out = work / name.replace(" ", "-")
        settings = ("--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no")
        command(
            "accelerate",
            "launch",
            *options,
            *settings,
            "-m",
            "clients.accelerate",
            models.start,
            out,
            folder=work,
            variables=variables,
        )
        found[name] = json.loads((out / "losses.json").read_text())
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (models.start, out))
    ours = [name for name in before if "_hc." in name]
    assert set(before) == set(after)
    assert bool(ours) == models.converted
    assert all((after[name] != before[name]).any() for name in before if "_hc." in name and name.endswith("weight"))
    return found


def train() -> None:
    """The script: every process takes its share of each batch, and the first writes the mean losses and the model."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    import kromhc_hf  # noqa: F401

    start, out = sys.argv[1:]
    accelerator = Accelerator()
    model = AutoModelForCausalLM.from_pretrained(start)
    ids = torch.randint(3, 500, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    model, optimiser, batches = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=1), DataLoader(ids, BATCH // accelerator.num_processes)
    )
    losses = []
    for batch in batches:
        loss = model(batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(out)
        Path(out, "losses.json").write_text(json.dumps(losses))


def agree(base: dict[str, list[float]], converted: dict[str, list[float]]) -> str:
    assert converted["two processes"][0] == base["two processes"][0], (base, converted)
    # Gradients of halves are added in another order: some roundings in each of three steps.
    for found in (base, converted):
        pairs = zip(found["two processes"], found["one process"])
        assert all(abs(two - one) < 1e-6 * one for two, one in pairs), found
    return (
        f"the first loss of the base; losses {shown(converted['two processes'])}, of the base "
        f"{shown(base['two processes'])}, those of one process with the same batches; saved and loaded"
    )


CLIENT = Client(
    tool="accelerate",
    requirements=("accelerate==1.15.0",),
    use="`import kromhc_hf` in the script.",
    checks=(
        Check("`load_checkpoint_and_dispatch` with layers on disk: distance from `from_pretrained`", dispatched, same),
        Check("`accelerate launch`, two processes on CPUs (gloo), three steps", launched, agree),
    ),
)

if __name__ == "__main__":
    train()
