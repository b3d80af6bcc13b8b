"""A checkpoint as a model to run: its configuration, the class that its head asks for, and all of its tensors."""

import copy
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from ..modeling.configuration_kromhc import KromHCConfig
from ..modeling.host import class_for_task, class_names_for_task
from ..modeling.modeling_kromhc import (
    FACES,
    GENERATIVE_FACES,
    HyperConnectedModel,
    KromHCForCausalLM,
    KromHCForQuestionAnswering,
    KromHCModel,
)
from ..modeling.remote_code import class_name
from .base import model_content
from .files import resolve_source
from .outside import bind_repository, runs_own_code
from .quantised import quantization_of, runnable
from .stored_tensors import StoredTensors, check_tensors


def family_of(config: Any) -> Any:
    """The configuration class of the family, of a model with hyper-connections or without."""
    return getattr(config, "backbone_config_class", type(config))


def face_of(config: Any) -> type[HyperConnectedModel]:
    """The task of a checkpoint, by the class that its configuration names in `architectures`.

    A configuration that names none is that of a model that continues a text, and so is one that names a class of a
    repository's own code `...ForCausalLM`.

    Raises:
        ValueError: if it names a class that no Auto class of transformers makes of this family.
    """
    names, family = getattr(config, "architectures", None) or [], family_of(config)
    known: list[str] = []
    for face in FACES:
        backbone = class_for_task(face.auto_class, family)
        plain = class_names_for_task(face.auto_class, family.model_type)
        known += plain
        if backbone is not None and {*plain, class_name(backbone, family)} & set(names):
            return face
    if not names or names[0].endswith("ForCausalLM"):
        made = (face for face in GENERATIVE_FACES if class_for_task(face.auto_class, family) is not None)
        return next(made, KromHCForCausalLM)
    raise ValueError(
        f"architectures in config.json must name a class of {family.model_type} that can be given hyper-connections: "
        f"{', '.join(dict.fromkeys(known))}; got {names[0]!r}. Load the checkpoint with one of them and save it with "
        "save_pretrained, or correct config.json."
    )


# What heads compute, where it is not called logits.
OUTPUT_NAMES: dict[Any, str] = {KromHCForQuestionAnswering: "start and end logits", KromHCModel: "last hidden state"}


def head_output(output: Any) -> Tensor:
    """What a head computes, as one tensor."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits if "logits" in output else output.last_hidden_state


@dataclass(frozen=True)
class StoredModel:
    """A checkpoint on disk that can be run; no code but that of transformers and this package is, unless trusted.

    Args:
        name: what the user calls it, a folder or Hub id.
        folder: where it is.
        config: its configuration.
        face: the task of its head.
        weight_variant: which set of weights, where the folder has several.
        own_code: whether its classes come from its folder.
    """

    name: str
    folder: Path
    config: Any
    face: type[HyperConnectedModel]
    weight_variant: str | None = None
    own_code: bool = False

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        subfolder: str = "",
        weight_variant: str | None = None,
        trust_remote_code: bool = False,
        also: Collection[str] = (),
    ) -> "StoredModel":
        """Finds a checkpoint and reads its configuration.

        Args:
            source: a folder or Hub id.
            revision: of the Hub repository.
            subfolder: where in it.
            weight_variant: which set of weights.
            trust_remote_code: whether code in its folder may be run.
            also: model types of transformers that may be run though they cannot be converted.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is an adapter, its family is not supported, its code must be trusted, or it names code of
                another repository.
        """
        wanted: dict[str, Any] = {"code": trust_remote_code, "weight_variant": weight_variant}
        folder = resolve_source(source, revision, subfolder, **wanted)
        content = model_content(folder)
        own_code = content.get("model_type") not in also and runs_own_code(content, folder, trust_remote_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=own_code)
        if own_code:
            bind_repository(config, folder)
        return cls(str(source), folder, config, face_of(config), weight_variant, own_code)

    def with_streams(self) -> "StoredModel":
        """The same, which must have hyper-connections.

        Raises:
            ValueError: if it has none.
        """
        if not isinstance(self.config, KromHCConfig):
            raise ValueError(
                f"a model with hyper-connections is needed here; {self.name} has model_type "
                f"{self.config.model_type!r}. Convert it first: kromhc convert {self.name} DESTINATION."
            )
        return self

    def skeleton(self, dtype: torch.dtype | None = None) -> Any:
        """The model on the meta device, in eval mode; by default in the dtype of its configuration."""
        given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        given["trust_remote_code"] = self.own_code
        # A copy, since the dtype is written into it.
        with torch.device("meta"):
            made = self.face.auto_class.from_config(copy.deepcopy(self.config), **given)
        return made.eval()

    def tensors(self) -> StoredTensors:
        """What is on disk."""
        return StoredTensors(self.folder, self.weight_variant)

    def check(self) -> None:
        """Refuses a checkpoint that does not hold the tensors of its class, see `check_tensors`."""
        check_tensors(self.skeleton(), self.tensors())

    def load(self, dtype: torch.dtype | str = "auto") -> Any:
        """The model, with no parameter that is not in the checkpoint.

        Raises:
            ValueError: naming tensors that are missing or of another shape, or a quantisation that cannot run here.
        """
        self.check()
        with runnable(self.config, self.folder):
            model, info = self.face.auto_class.from_pretrained(
                self.folder,
                config=self.config,
                variant=self.weight_variant,
                dtype=dtype,
                trust_remote_code=self.own_code,
                output_loading_info=True,
            )
        if info["missing_keys"]:
            raise ValueError(
                f"a checkpoint must hold the tensors of its class, {type(model).__name__}; {self.folder}, which is "
                f"quantised ({quantization_of(self.config)}), lacks {', '.join(sorted(info['missing_keys'])[:4])}. "
                "Fetch its files again."
            )
        return model
