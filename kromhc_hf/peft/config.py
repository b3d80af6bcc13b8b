"""The configuration of hyper-connections as a PEFT method."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.utils import PeftType

from ..modeling.options import OPTIONS, StreamOptions, with_option_fields


TYPE_NAME = "KROMHC"


def peft_type() -> PeftType:
    """The member of PEFT's enumeration of methods; `register_peft_method` refuses names that are not in it."""
    if TYPE_NAME not in PeftType.__members__:
        member = str.__new__(PeftType, TYPE_NAME)
        member._name_, member._value_ = TYPE_NAME, TYPE_NAME
        PeftType._member_map_[TYPE_NAME] = member
        PeftType._member_names_.append(TYPE_NAME)
        PeftType._value2member_map_[TYPE_NAME] = member
        type.__setattr__(PeftType, TYPE_NAME, member)
    return PeftType[TYPE_NAME]


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
        target_modules: filled in with the decoder layers of the base.

    Raises:
        ValueError: for an option that is not allowed.
    """

    base_model_type: str | None = None
    base_hidden_size: int | None = None
    base_num_layers: int | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None: ...

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
