"""The configuration of hyper-connections as a PEFT method."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.utils import PeftType

from ..conversion.files import ADAPTER_TYPE
from ..modeling.options import OPTIONS, StreamOptions, with_option_fields


if TYPE_CHECKING:
    from typing import Unpack

    from ..modeling.options import StreamKeywords

    class _Fields(StreamKeywords, total=False):
        """What the constructor takes: the options, and the fields of PEFT and below."""

        task_type: Any
        inference_mode: bool
        base_model_name_or_path: str | None
        revision: str | None
        base_model_type: str | None
        base_hidden_size: int | None
        base_num_layers: int | None
        base_family: dict[str, Any] | None
        target_modules: str | list[str] | None
        modules_to_save: list[str] | None


def peft_type() -> PeftType:
    """The member of PEFT's enumeration of methods; `register_peft_method` refuses names that are not in it."""
    if ADAPTER_TYPE not in PeftType.__members__:
        member = str.__new__(PeftType, ADAPTER_TYPE)
        member._name_, member._value_ = ADAPTER_TYPE, ADAPTER_TYPE
        PeftType._member_map_[ADAPTER_TYPE] = member
        PeftType._member_names_.append(ADAPTER_TYPE)
        PeftType._value2member_map_[ADAPTER_TYPE] = member
        type.__setattr__(PeftType, ADAPTER_TYPE, member)
    return PeftType[ADAPTER_TYPE]


@dataclass
@with_option_fields
class KromHCPeftConfig(PeftConfig):
    """Hyper-connections as a PEFT adapter: `get_peft_model(base_model, KromHCPeftConfig(num_streams=4))`.

    The base stays a plain transformers model, whose output a new adapter leaves unchanged with init "identity". Every
    option of `apply_hyper_connections` is a field, see `StreamOptions`. Several adapters can be added and switched, one
    is active at a time. They can be stacked with LoRA, but not merged: the mappings depend on the token, and no weight
    of the base does.

    Args:
        **options: of the hyper-connections, see `StreamOptions`.
        base_model_type: filled in when the adapter is made; another base is refused when it is loaded.
        base_hidden_size: likewise.
        base_num_layers: likewise.
        base_family: filled in with the row of a base from outside, which is registered where there is none.
        target_modules: filled in with the decoder layers of the base.

    Raises:
        ValueError: for an option that is not allowed.
    """

    base_model_type: str | None = None
    base_hidden_size: int | None = None
    base_num_layers: int | None = None
    base_family: dict[str, Any] | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Unpack[_Fields]) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        vars(self).update(self.stream_options().to_dict())

    def stream_options(self) -> StreamOptions:
        """The options of the hyper-connections.

        Raises:
            ValueError: if one of them has a value that is not allowed.
        """
        return StreamOptions(**{name: getattr(self, name) for name in OPTIONS})
