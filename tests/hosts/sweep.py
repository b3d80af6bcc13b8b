"""Every variant of every family on the release of transformers that comes first on the path.

`sweep.py RESULTS FOLDER [VARIANT ...]` writes what came out as JSON, and leaves in FOLDER a model of each variant,
saved with separate streams, beside the family's own and what both compute; `across.py` loads them on another release.
"""

import contextlib
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from hosts.outcomes import Outcome, compare
from safetensors.torch import save_file
from support.tiny import configurations, make_model, separate_streams, token_ids, variants
from transformers import AutoModelForCausalLM

from kromhc_hf import apply_hyper_connections
from kromhc_hf.modeling.layer_fit import layer_specs


NEW_TOKENS = 4


def padded(config: Any) -> dict[str, torch.Tensor]:
    ids = token_ids(config)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any) -> tuple[torch.Tensor, ...]:
    """The tokens, and the logits of every step."""
    answer = model.generate(
        **padded(model.config),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return (answer.sequences, *answer.logits)


def logits(model: Any) -> torch.Tensor:
    return model(input_ids=token_ids(model.config), use_cache=False).logits


def recorded(model: Any) -> dict[str, Any]:
    options = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    return dict(model(input_ids=token_ids(model.config), **options))


def gradients(model: Any, checkpointed: bool) -> dict[str, torch.Tensor]:
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    if checkpointed:
        enable({"use_reentrant": False})
    model.zero_grad()
    torch.manual_seed(3)
    ids = token_ids(model.config)
    model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Variant:
    """One variant of a family, natively and with hyper-connections."""

    def __init__(self, name: str, model_type: str, position: int):
        self.name, self.model_type, self.position = name, model_type, position

    def config(self, **fields: Any) -> Any:
        config = configurations(self.model_type)[self.position]
        for field, value in fields.items():
            setattr(config, field, value)
        return config

    def native(self, **fields: Any) -> Any:
        return make_model(self.config(**fields))

    def connected(self, separate: bool = False, **fields: Any) -> Any:
        model = apply_hyper_connections(self.native(**fields))
        if separate:
            separate_streams(model)
        return model

    def difference(self, actual: Any, expected: Any) -> str:
        """What is not equal, bitwise where the family's row promises it."""
        if isinstance(expected, dict):
            if list(actual) != list(expected):
                return f"has {list(actual)}, not {list(expected)}"
            return self.difference(tuple(actual.values()), tuple(expected.values()))
        if isinstance(expected, tuple | list):
            if len(actual) != len(expected):
                return f"has {len(actual)} parts, not {len(expected)}"
            return next(filter(None, map(self.difference, actual, expected)), "")
        if not isinstance(expected, torch.Tensor):
            return ""
        if actual.shape != expected.shape:
            return f"has shape {list(actual.shape)}, not {list(expected.shape)}"
        if torch.equal(actual, expected):
            return ""
        gap = (actual.float() - expected.float()).abs().max()
        exact = all(spec.exact for spec in layer_specs(self.config(), self.model_type))
        # At most half a unit per layer and sum, three layers, which the logits' own gain of about two doubles.
        allowed = 0 if exact else 4 * torch.finfo(torch.float32).eps * expected.abs().max()
        return "" if gap <= allowed else f"differs by up to {gap:.1e}"

    def logits(self) -> Outcome:
        return self._same(logits)

    def generation(self) -> Outcome:
        return self._same(generated)

    def records(self) -> Outcome:
        return self._same(recorded, _attn_implementation="eager")

    @torch.no_grad()
    def _same(self, function: Any, **fields: Any) -> Outcome:
        expected: list[Any] = []

        def native() -> str:
            expected.append(function(self.native(**fields)))
            return "" if expected[0] is not None else "nothing"

        return compare(native, lambda: self.difference(function(self.connected(**fields)), expected[0]))

    @torch.no_grad()
    def saving(self, folder: Path) -> Outcome:
        facts: dict[str, torch.Tensor] = {}

        def round_trip(kind: str) -> str:
            model = self.connected(separate=True) if kind == "connected" else self.native()
            facts[f"{kind}.logits"] = logits(model)
            with contextlib.suppress(Exception):  # what it cannot do is seen in `generation`
                facts[f"{kind}.tokens"] = generated(model)[0]
            model.save_pretrained(folder / kind)
            save_file({name: fact.contiguous() for name, fact in facts.items()}, folder / "facts.safetensors")
            loaded, info = AutoModelForCausalLM.from_pretrained(folder / kind, output_loading_info=True)
            wrong = [
                f"{key}: {sorted(map(str, info[key]))[:3]}" for key in ("missing_keys", "unexpected_keys") if info[key]
            ]
            if type(loaded) is not type(model):
                wrong.append(f"{type(loaded).__name__}, not {type(model).__name__}")
            difference = "" if torch.equal(logits(loaded.eval()), facts[f"{kind}.logits"]) else "loaded logits differ"
            return "; ".join([*wrong, difference] if difference else wrong)

        return compare(lambda: round_trip("native"), lambda: round_trip("connected"))

    def checkpointing(self) -> Outcome:
        def check(connected: bool) -> str:
            model = self.connected(separate=True) if connected else self.native()
            if not model.supports_gradient_checkpointing:
                return "the family has no checkpointing"
            plain, again = gradients(model, False), gradients(model, True)
            if plain.keys() != again.keys():
                return f"has no gradient of {sorted(plain.keys() ^ again.keys())[0]}"
            without = [name for name, _ in model.named_parameters() if "_hc." in name and name not in plain]
            if without:
                return f"has no gradient of {without[0]}"
            return "" if all(torch.equal(again[name], grad) for name, grad in plain.items()) else "gradients differ"

        return compare(lambda: check(False), lambda: check(True))


def sweep(folder: Path, chosen: list[str]) -> dict[str, dict[str, Outcome]]:
    """The outcome of every check of every variant, or of those that are chosen."""
    results: dict[str, dict[str, Outcome]] = {}
    for name, model_type, position in variants():
        if chosen and name not in chosen:
            continue
        variant = Variant(name, model_type, position)
        (folder / name).mkdir(parents=True)
        found = {
            "logits": variant.logits(),
            "generation": variant.generation(),
            "records": variant.records(),
            "saving": variant.saving(folder / name),
            "checkpointing": variant.checkpointing(),
        }
        for check, outcome in found.items():
            results.setdefault(check, {})[name] = outcome
    return results


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = sweep(Path(sys.argv[2]), sys.argv[3:])
    serial = {check: {name: dataclasses.asdict(o) for name, o in outcomes.items()} for check, outcomes in found.items()}
    Path(sys.argv[1]).write_text(json.dumps({"version": transformers.__version__, "results": serial}))
