"""mergekit: two models that were fine-tuned apart, merged by its command."""

from pathlib import Path

from clients.client import Check, Client, Models, command


HALF = """merge_method: linear
dtype: float32
models:
  - {{model: {tuned}, parameters: {{weight: 0.5}}}}
  - {{model: {other}, parameters: {{weight: 0.5}}}}
"""
# What was changed in both is added to where they started.
TASKS = """merge_method: task_arithmetic
dtype: float32
base_model: {start}
models:
  - {{model: {tuned}, parameters: {{weight: 0.7}}}}
  - {{model: {other}, parameters: {{weight: 0.4}}}}
"""


def merged(models: Models, work: Path, recipe: str) -> tuple[float, int, int]:
    """The largest distance of any tensor from the sum by hand, how many there are, and how many of them ours."""
    from transformers import AutoModelForCausalLM

    (work / "recipe.yaml").write_text(recipe.format(tuned=models.tuned, other=models.other, start=models.start))
    command("mergekit-yaml", work / "recipe.yaml", work / "out", "--trust-remote-code", folder=work)
    # The command that merged has not imported this package; the one who loads the result has, or trusts its code.
    import kromhc_hf  # noqa: F401

    loaded = {name: AutoModelForCausalLM.from_pretrained(getattr(models, name)) for name in ("start", "tuned", "other")}
    start, tuned, other = (loaded[name].state_dict() for name in ("start", "tuned", "other"))
    out = AutoModelForCausalLM.from_pretrained(work / "out").state_dict()
    assert set(out) == set(tuned)
    if recipe is HALF:
        expected = {name: 0.5 * tuned[name] + 0.5 * other[name] for name in out}
    else:
        expected = {name: s + 0.7 * (tuned[name] - s) + 0.4 * (other[name] - s) for name, s in start.items()}
    ours = [name for name in out if "_hc." in name]
    assert all((out[name] - tuned[name]).abs().max() > 1e-3 for name in ours)
    error = max((out[name] - expected[name]).abs().max().item() for name in out)
    return error, len(out), len(ours)


def linear(models: Models, work: Path) -> tuple[float, int, int]:
    return merged(models, work, HALF)


def tasks(models: Models, work: Path) -> tuple[float, int, int]:
    return merged(models, work, TASKS)


def agree(base: tuple[float, int, int], converted: tuple[float, int, int]) -> str:
    error, count, ours = converted
    assert ours > 0
    assert count == base[1] + ours, f"{count} tensors, {ours} of them ours; the base has {base[1]}"
    # Sums of a few numbers of this size, in another order.
    assert max(error, base[0]) < 1e-6, f"tensors are {error} away from the sum by hand, of the base {base[0]}"
    return f"all {count} tensors, {ours} of hyper-connections among them, within {error:.1g} of the sum by hand"


CLIENT = Client(
    tool="mergekit",
    requirements=("mergekit==0.1.5",),
    use="`mergekit-yaml RECIPE OUT --trust-remote-code`. Without it mergekit stops, as it does not know the class. "
    "With `dtype: float32` hyper-connections stay in fp32; the merged folder has the code of the model.",
    checks=(
        Check("`mergekit-yaml`, `linear`, two tuned models", linear, agree),
        Check("`mergekit-yaml`, `task_arithmetic`, two tuned models and their start", tasks, agree),
    ),
)
