"""Prefill and decode of a model with streams, in turn with the same model without.

python -m benchmarks.generation MODEL_FOLDER
"""

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache

from benchmarks.measuring import DTYPES, FASTEST, TRAINED, arguments, as_trained, bars, in_turn, ratio, report
from kromhc_hf import apply_hyper_connections


def main() -> None:
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("model", help="folder or Hub id of a checkpoint without streams")
    parser.add_argument("--streams", type=int, nargs="+", default=[4])
    parser.add_argument(
        "--stream-layers", nargs="+", default=["all"], help="layers with streams, each a slice like 4:6"
    )
    parser.add_argument("--trained", action="store_true", help=TRAINED)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--compile", action="store_true", help="measure compiled decoding with a static cache as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype]).to(options.device).eval()
    models = {"no streams": base}
    for n in options.streams:
        for layers in options.stream_layers:
            name = f"n={n}" + ("" if layers == "all" else f", layers {layers}")
            models[name] = apply_hyper_connections(copy.deepcopy(base), n, layers=layers)
            if options.trained:
                as_trained(models[name])
    prompt = torch.randint(base.config.vocab_size, (1, options.prompt), device=options.device)

    candidates = {}
    for name, model in models.items():
        candidates[name, "prefill"] = prefill(model, prompt)
        candidates[name, "decode"] = decode(model, model, prompt, options.new, static=False)
        if options.compile:
            candidates[name, "decode compiled"] = decode(model, torch.compile(model), prompt, options.new, static=True)
    seconds = in_turn(candidates, options)
    rows = []
    for (name, phase), taken in seconds.items():
        count = options.prompt if phase == "prefill" else options.new
        relative = ratio(seconds["no streams", phase], taken)
        rows.append({"model": name, "phase": phase, "tokens/s": count / min(taken), "of no streams": relative})
    report(rows, options, FASTEST)
    if options.plot:
        bars(rows, lambda row: f"{row['model']} {row['phase']}", "of no streams", options.plot)


def prefill(model: Any, prompt: torch.Tensor) -> Any:
    @torch.no_grad()
    def run() -> None:
        model(prompt, logits_to_keep=1)

    return run


def decode(model: Any, call: Any, prompt: torch.Tensor, new: int, static: bool) -> Any:
    """Greedy steps after a short prompt; the loop of `generate` would hide what is measured."""

    @torch.no_grad()
    def run() -> None:
        length = 4 + new
        cache = StaticCache(config=model.config, max_cache_len=length) if static else None
        out = model(prompt[:, :4], past_key_values=cache, use_cache=True)
        for _ in range(new):
            token = out.logits[:, -1:].argmax(-1)
            out = call(token, past_key_values=out.past_key_values, use_cache=True)

    return run


if __name__ == "__main__":
    main()
