"""accelerate: a model loaded by its own reader of checkpoints, with part of it on disk."""

from pathlib import Path
from typing import Any

from clients.client import Check, Client, Models, same


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
    use="`import kromhc_hf` in the script.",
    checks=(
        Check("`load_checkpoint_and_dispatch` with layers on disk: distance from `from_pretrained`", dispatched, same),
    ),
)
