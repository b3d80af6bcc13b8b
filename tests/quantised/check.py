"""What is checked of one scheme.

Where the base itself fails at something, that is said of it, and the same is not asked of ours.
"""

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from hosts.outcomes import Outcome, compare, words
from quantised.schemes import SCHEMES, Scheme, configuration
from safetensors.torch import load_file
from support import reference
from support.tiny import make_model, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

from kromhc_hf import (
    KromHCPeftConfig,
    apply_hyper_connections,
    convert_checkpoint,
    hyper_connection_state_dict,
    remove_hyper_connections,
    verify_conversion,
)


CHECKS = {
    "files": "a stored base is converted: its tensors and `quantization_config` stay, hyper-connections are fp32",
    "logits": "the converted or changed model computes the bits of the quantised base, and so it does after removal",
    "streams": "far from the init it computes what the slow equations give with the same branches",
    "training": "hyper-connections alone are trained as an adapter: finite gradients, the loss falls, the base stays",
    "saving": "the model with hyper-connections is saved and loaded, and computes the same bits",
    "verify": "`kromhc verify` finds the conversion lossless",
    "layers": "so does `kromhc verify --layerwise`, which finds a changed layer as well",
}
# Of what the hyper-connections change: an input that is rounded to 8 bits may fall to the other side, by 1/127.
TOLERANCE = 0.05
REFUSED = "`--layerwise` is refused by name: the method unpacks whole models, not layers"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(token_ids(model.config)).logits


def push(model: Any) -> Any:
    """Takes hyper-connections far from their init."""
    torch.manual_seed(3)
    for tensor in hyper_connection_state_dict(model).values():
        tensor.data.add_(0.4 * torch.randn_like(tensor))
    return model


def slow_logits(model: Any) -> Tensor:
    """The logits of a llama from the equations, with its own sublayers as branches."""
    decoder, ids = model.model, token_ids(model.config)
    hidden = decoder.embed_tokens(ids)
    rotary = decoder.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    streams = hidden.unsqueeze(-2).expand(*ids.shape, model.config.hc_num_streams, -1)
    for layer in decoder.layers:

        def attention(x: Tensor, layer: Any = layer) -> Tensor:
            x = layer.input_layernorm(x.to(hidden.dtype))
            return layer.self_attn(x, position_embeddings=rotary, attention_mask=None)[0].float()

        def feed_forward(x: Tensor, layer: Any = layer) -> Tensor:
            return layer.mlp(layer.post_attention_layernorm(x.to(hidden.dtype))).float()

        for module, branch in ((layer.attn_hc, attention), (layer.ffn_hc, feed_forward)):
            parameters = dict(module.named_parameters())
            streams = reference.eager_kromhc(parameters, streams.float(), branch, module.eps)[1].to(hidden.dtype)
    return model.lm_head(decoder.norm(streams.float().mean(-2).to(hidden.dtype)))


class Case:
    """One scheme in a folder of its own."""

    def __init__(self, scheme: Scheme, folder: Path):
        self.scheme, self.folder = scheme, folder
        torch.manual_seed(0)
        make_model(scheme.configuration()).save_pretrained(folder / "full")
        if scheme.make is not None:
            scheme.make(folder / "full", folder / "base")

    def base(self) -> Any:
        if self.scheme.make is not None:
            return AutoModelForCausalLM.from_pretrained(self.folder / "base")
        return AutoModelForCausalLM.from_pretrained(self.folder / "full", quantization_config=self.scheme.live())

    def converted(self) -> Any:
        if self.scheme.make is not None:
            return AutoModelForCausalLM.from_pretrained(self.folder / "out")
        return apply_hyper_connections(self.base())

    def files(self) -> str:
        base, out = self.folder / "base", self.folder / "out"
        convert_checkpoint(base, out)
        before, after = (everything(folder) for folder in (base, out))
        settings = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (base, out)]
        added = [tensor for name, tensor in after.items() if name not in before]
        if any(not same_bits(tensor, after[name]) for name, tensor in before.items()):
            return "a tensor of the base has changed"
        if settings[0] != settings[1]:
            return "quantization_config has changed"
        wide = added and all(tensor.dtype is torch.float32 for tensor in added)
        return "" if wide else "hyper-connections are not in fp32"

    def native_logits(self) -> str:
        model = self.base()
        return "" if torch.equal(logits(model), logits(model)) else "other logits every time"

    def logits(self) -> str:
        expected, model = logits(self.base()), self.converted()
        if {tensor.dtype for tensor in hyper_connection_state_dict(model).values()} != {torch.float32}:
            return "hyper-connections are not in fp32"
        if not torch.equal(logits(model), expected):
            return "other logits"
        live = apply_hyper_connections(self.base())
        if not torch.equal(logits(live), expected):
            return "other logits of a changed model"
        same = all(torch.equal(logits(remove_hyper_connections(one)), expected) for one in (model, live))
        return "" if same else "other logits after removal"

    def streams(self) -> str:
        model = self.converted()
        before = logits(model).float()
        after = logits(push(model)).float()
        with torch.no_grad():
            error = (slow_logits(model).float() - after).abs().max().item()
        effect = (after - before).abs().max().item()
        close = effect > 0 and error <= TOLERANCE * effect
        return "" if close else f"{error:.2g} from the equations, of an effect of {effect:.2g}"

    def native_gradients(self) -> str:
        model = self.base().train()
        ids = token_ids(model.config)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=ids).loss.backward()
        return "" if embedded.grad is not None and embedded.grad.isfinite().all() else "gradients that are not finite"

    def training(self) -> str:
        from peft import get_peft_model

        model = get_peft_model(self.base(), KromHCPeftConfig(task_type="CAUSAL_LM")).train()
        ids = token_ids(model.config)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, losses = torch.optim.Adam(trained, lr=3e-2), []
        for _ in range(8):
            loss = model(ids, labels=ids).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            if not all(p.grad is not None and p.grad.isfinite().all() for p in trained):
                return "gradients that are not finite"
            optimizer.step()
        if not losses[-1] < losses[0]:
            return f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
        with model.eval().disable_adapter():
            return "" if torch.equal(logits(model), logits(self.base())) else "the base has changed"

    def saved(self, make: Callable[[], Any], **options: Any) -> str:
        model = make()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            expected = logits(model)
            model.save_pretrained(folder, **options)
            return "" if torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected) else "other logits"

    def native_saved(self) -> str:
        """As ours is saved by itself."""
        return self.saved(self.base, save_original_format=False)

    def verify(self) -> str:
        report = verify_conversion(self.folder / "base", self.folder / "out", max_tokens=32, new_tokens=4)
        return "" if report.lossless and report.bitwise_equal else "not lossless"

    def layers(self) -> str:
        try:
            return self.verified_by_layers()
        except ValueError as error:
            if f"is quantised ({self.scheme.method})" in str(error) and "leave layers out" in str(error):
                return REFUSED
            raise

    def verified_by_layers(self) -> str:
        report = verify_conversion(self.folder / "base", self.folder / "out", max_tokens=32, layers="all")
        if not (report.lossless and report.bitwise_equal):
            return "not lossless"
        for path in (self.folder / "out").glob("*.safetensors"):
            tensors = load_file(path)
            if name := next((name for name in tensors if name.endswith("layers.1.ffn_hc.bias")), None):
                tensors[name][4] += 0.5  # a write weight
                transformers.modeling_utils.safe_save_file(tensors, path, {"format": "pt"})
        report = verify_conversion(self.folder / "base", self.folder / "out", max_tokens=32, layers="all")
        return "" if report.first_different_layer == 1 else "a changed layer is not found"


def everything(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    raw = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype is other.dtype and one.shape == other.shape and torch.equal(*raw)


def checked(scheme: Scheme, folder: Path) -> Mapping[str, Outcome | None]:
    """What came out, by check; None for what does not apply."""
    found: dict[str, Outcome | None] = dict.fromkeys(CHECKS)
    try:
        case = Case(scheme, folder)
    except Exception as error:
        return {**found, "logits": Outcome(words(error), native=True)}

    def nothing() -> str:
        return ""

    if stored := scheme.make is not None:
        found["files"] = compare(nothing, case.files)
        if not found["files"].passed:
            return found
    found["logits"] = compare(case.native_logits, case.logits)
    if found["logits"].native:
        return found
    if scheme.configuration is configuration:  # the slow equations are written for its layers
        found["streams"] = compare(nothing, case.streams)
    found["training"] = compare(case.native_gradients, case.training)
    found["saving"] = compare(case.native_saved, lambda: case.saved(lambda: push(case.converted())))
    if stored:
        found["verify"] = compare(nothing, case.verify)
        found["layers"] = compare(nothing, case.layers)
    return found


def into_file(output: Path, name: str) -> None:
    """What a process is started for: one scheme, and what is found of it as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # The threads of AQLM's kernel for CPUs add to the same numbers without waiting for each other.
    os.environ["NUMBA_NUM_THREADS"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        found = checked(SCHEMES[name], Path(folder))
    output.write_text(json.dumps({check: outcome and dataclasses.asdict(outcome) for check, outcome in found.items()}))
