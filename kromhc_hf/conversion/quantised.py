"""What a quantised checkpoint needs to be run: which method stored its weights, and what unpacks them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import get_hf_quantizer


# The methods that unpack the weights of a layer with nothing but what is stored in that layer.
BY_LAYERS = ("bitsandbytes", "torchao", "compressed-tensors", "fp8", "mxfp8", "mxfp4", "bitnet", "gemma")
WHOLE = "that method unpacks a whole model at once, after all of its weights are there"


def quantization_of(config: Any) -> str | None:
    """The method by which the weights of a checkpoint are quantised; None if they are stored as they are."""
    text_config = config.get_text_config(decoder=True)
    found = getattr(config, "quantization_config", None) or getattr(text_config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


@contextmanager
def runnable(config: Any, folder: Path) -> Iterator[None]:
    """Says of a quantised checkpoint which method cannot be run here, and that it need not be run to be converted.

    Raises:
        ValueError: in the place of what the method raises.
    """
    method = quantization_of(config)
    try:
        yield
    except Exception as error:
        if method is None:
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"a checkpoint must be run to be verified; {folder} is quantised ({method}), which does not run here: "
            f"{reason.removesuffix('.')}. Verify it where it runs. Converting it needs no run: kromhc convert "
            "--no-verify (verify=False)."
        ) from error


def layer_quantizer(config: Any, folder: Path) -> Any:
    """What unpacks a checkpoint of which one layer is in memory at a time; None if it is not quantised.

    Raises:
        ValueError: naming the method, if it cannot be done by layers, or not here.
    """
    method = quantization_of(config)
    if method is None:
        return None
    if method not in BY_LAYERS:
        raise ValueError(
            f"weights must be unpacked layer by layer where layers are run one at a time ({', '.join(BY_LAYERS)}); "
            f"{folder} is quantised ({method}), and {WHOLE}. Verify it in one piece: leave layers out (kromhc verify "
            "without --layerwise)."
        )
    with runnable(config, folder):
        # A copy, since the method writes into it.
        quantizer = get_hf_quantizer(copy.deepcopy(config), None, None, True, {})[0]
    # To numbers where that can be asked for: what a method packs for its kernels, or unpacks in the first forward, it
    # does with the whole model.
    if hasattr(quantizer.quantization_config, "dequantize"):
        quantizer.quantization_config.dequantize = True
    return quantizer


def prepare(model: Any, quantizer: Any, dtype: torch.dtype, stored: Any) -> None:
    """Puts the modules of a method into a model on the meta device.

    Args:
        model: without weights.
        quantizer: from `layer_quantizer`.
        dtype: of what is not quantised.
        stored: the tensors of the checkpoint, a StoredTensors.
    """
    files = [str(stored.folder / file) for file in dict.fromkeys(stored.files.values())]
    with torch.device("meta"):
        quantizer.preprocess_model(model=model, dtype=dtype, device_map={"": "cpu"}, checkpoint_files=files or None)


class Blank:
    """A layer as it is before its weights come, which running them may change more of than the weights.

    Args:
        layer: on the meta device.
    """

    def __init__(self, layer: nn.Module):
        self.modules = list(layer.modules())
        # What is shared with the rest of the model stays what it is, and loading puts others in the place of tensors.
        configs = (value for module in self.modules for value in vars(module).values())
        same = (*self.modules, *layer.parameters(), *layer.buffers(), *configs)
        kept = {id(one): one for one in same if isinstance(one, nn.Module | torch.Tensor | PreTrainedConfig)}
        self.contents = [
            copy.deepcopy({name: value for name, value in vars(module).items() if "hooks" not in name}, kept)
            for module in self.modules
        ]

    def restore(self) -> None:
        """Drops the weights, and whatever else came with them."""
        for module, content in zip(self.modules, self.contents):
            hooks = {name: value for name, value in vars(module).items() if "hooks" in name}
            vars(module).clear()
            vars(module).update(content | hooks)
