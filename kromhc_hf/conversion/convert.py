"""A checkpoint with hyper-connections from one without: the base tensors stay as they are, a small file is added."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..derivation import derive_family, load_for_reading
from ..modeling.configuration_kromhc import KromHCConfig
from ..modeling.connection_plan import find_decoder, present_plan
from ..modeling.model_card import model_card
from ..modeling.options import StreamKeywords, StreamOptions, given_options, show_options
from ..modeling.remote_code import take_code_along
from ..modeling.stream_module import StreamModule
from ..row_contradiction import check_against_source
from .base import BaseCheckpoint
from .disk import check_link, new_folder, real_path
from .files import CARD, WEIGHTS_INDEX, weight_file_names, write_json
from .report import ConversionReport
from .stored_model import StoredModel
from .stored_tensors import check_tensors
from .tensor_files import TensorForm, tensor_bytes, write_safetensors
from .verification import verify_conversion


if TYPE_CHECKING:
    from typing import Unpack

# The fields of a report that go into the configuration and the model card.
VERIFICATION = (
    "dtype",
    "tokens",
    "text",
    "image",
    "output",
    "bitwise_equal",
    "max_logit_difference",
    "max_logit",
    "mean_kl",
    "top1_agreement",
    "lossless",
)


@show_options(StreamKeywords)
def convert_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    weight_variant: str | None = None,
    link: str = "copy",
    base_model: str | None = None,
    verify: bool = False,
    trust_remote_code: bool = False,
    derive: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    part: Callable[[str], None] = lambda name: None,
    **options: "Unpack[StreamKeywords]",
) -> ConversionReport:
    """Writes a checkpoint with n residual streams from a checkpoint without; no base tensor is loaded or rewritten.

    The destination holds the base's weight files as they are, one small file with the hyper-connections as the last
    shard, the index that joins them, the configuration with the code files that load it anywhere, a model card, and the
    tokenizer and generation files. Weights and index bear the standard names, by which every tool finds them all. It
    appears in one piece or not at all, and the source is only read. Older `.bin` weights are rewritten as safetensors,
    shard by shard.

    Args:
        source: folder of the base checkpoint, or its Hub id.
        destination: folder to make; must not exist or be empty.
        revision: of the Hub repository.
        subfolder: where the base is in the source.
        weight_variant: which set of weights of the base, what transformers calls `variant`, such as "fp16".
        link: how the base's weight files get into the destination: "copy"; "hardlink" or "symlink", which take no
            space and no time; or "reflink-if-possible", a copy that shares its blocks where the file system can.
        base_model: Hub id of the base for the model card, where the source is a folder that does not tell.
        verify: whether to run base and converted model before the destination appears, see `verify_conversion`.
        trust_remote_code: whether code in the source may be run, for a family that `register_family` has a row of and
            whose code is not in transformers. For families of transformers none ever is.
        derive: whether to load the base and read a row from its source, where no row describes its family; see
            `derive_family`.
        progress: called with the bytes done so far and in all.
        part: called with a few words as each part of the work begins.
        **options: of the hyper-connections, see `StreamOptions`.

    Raises:
        FileNotFoundError: if the source does not exist or has no weights.
        FileExistsError: if the destination is not empty, or being made by another process.
        OSError: if the destination cannot be written, or not in the way that `link` says.
        ValueError: if the family or an option is not supported, the source is damaged, changes meanwhile, names code
            of another repository, or has been converted already.
    """
    check_link(link)
    part("looking at the base")
    chosen = StreamOptions(**given_options((), options))
    base = BaseCheckpoint.open(
        *(source, revision, base_model), subfolder=subfolder, weight_variant=weight_variant, code=trust_remote_code
    )
    if derive:
        derive_family(load_for_reading(base.folder, trust_remote_code, weight_variant))
    opened: dict[str, Any] = {"weight_variant": weight_variant, "trust_remote_code": trust_remote_code}
    stored, destination = StoredModel.open(base.folder, **opened), Path(destination)
    # By the names that options have here, before the configuration says it by its own.
    chosen = chosen.in_model(stored.config.get_text_config().num_hidden_layers)
    config: Any = KromHCConfig(backbone_config=stored.config, **chosen.as_fields())
    model = replace(stored, config=config, own_code=False).skeleton()
    check_against_source(present_plan(find_decoder(model)))
    config.architectures = [type(model).__name__]
    config.hc_conversion = base.origin
    added = added_tensors(model)
    check_tensors(model, stored.tensors(), besides=added)
    # A model.safetensors beats every index and would hide the hyper-connections: a single file becomes a first shard.
    names = weight_file_names(len(base.weights.files) + bool(added))
    part("copying" if link == "copy" else "linking")
    with new_folder(destination) as target:
        base_files = base.bring_into(target, names, link, progress)
        if added:
            write_safetensors(target / names[-1], added, initial_tensors(model))
        if len(names) > 1:
            _write_index(target / WEIGHTS_INDEX, {**base_files, **dict.fromkeys(added, names[-1])})
        take_code_along(config, target)
        config.to_json_file(target / "config.json")
        report = ConversionReport.of(
            source,
            destination,
            config,
            base_tensors=len(base_files),
            added_parameters=sum(torch.Size(form.shape).numel() for form in added.values()),
            added_bytes=sum(form.nbytes for form in added.values()),
        )
        if verify:
            report = verify_conversion(base.folder, target, **opened, report=report, part=part)
            numbers = {number: getattr(report, number) for number in VERIFICATION}
            config.hc_conversion = {**base.origin, "verification": numbers}
            config.to_json_file(target / "config.json")
        (target / CARD).write_text(model_card(config, real_path(destination).name), encoding="utf-8")
        base.check_unchanged()
    return report


def added_tensors(model: torch.nn.Module) -> dict[str, TensorForm]:
    """What the conversion adds to a model, by state-dict key; the model may be on the meta device."""
    return {
        f"{name}.{key}": TensorForm.of(tensor)
        for name, module in _added_modules(model)
        for key, tensor in module.state_dict().items()
    }


def initial_tensors(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The initial values of `added_tensors`, for a model on the meta device; each is gone when the next one comes."""
    sizes = [sum(tensor.numel() for tensor in module.state_dict().values()) for _, module in _added_modules(model)]
    # All in the same memory: what is allocated and freed once per module fragments the heap and is never given back.
    memory = torch.empty(max(sizes, default=0), dtype=torch.float32)
    for name, module in _added_modules(model):
        place(module, memory).reset_parameters()
        yield from ((f"{name}.{key}", tensor) for key, tensor in module.state_dict().items())
        module.to_empty(device="meta")


def place(module: StreamModule, memory: Tensor) -> StreamModule:
    """Puts the parameters of a module one after the other into `memory` `[N]`, uninitialised."""
    begin = 0

    def view(tensor: Tensor) -> Tensor:
        nonlocal begin
        begin += tensor.numel()
        return memory[begin - tensor.numel() : begin].view(tensor.shape)

    module._apply(view)
    return module


def _write_index(path: Path, files: dict[str, str]) -> None:
    """Writes which file beside the index holds which tensor."""
    size = sum(map(tensor_bytes, path.parent.glob("*.safetensors")))
    write_json(path, {"metadata": {"total_size": size}, "weight_map": files})


def _added_modules(model: torch.nn.Module) -> Iterator[tuple[str, StreamModule]]:
    """Hyper-connections, and learned ends of the streams where there are any."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, StreamModule))
