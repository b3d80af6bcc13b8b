"""The configuration of hyper-connections as a PEFT method."""

from dataclasses import dataclass

from peft import PeftConfig
from peft.utils import PeftType

from ..modeling.hyper_connection import check_init
from ..modeling.variants import make_mixing


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
class KromHCPeftConfig(PeftConfig):
    """Hyper-connections as a PEFT adapter: `get_peft_model(base_model, KromHCPeftConfig(num_streams=4))`.

    The base stays a plain transformers model, whose output a new adapter leaves unchanged with init "identity". The
    options are those of `apply_hyper_connections`. Several adapters can be added and switched, one is active at a time.
    They can be stacked with LoRA, but not merged: the mappings depend on the token, and no weight of the base does.

    Args:
        base_model_type: filled in when the adapter is made; another base is refused when it is loaded.
        base_hidden_size: likewise.
        base_num_layers: likewise.
        target_modules: filled in with the decoder layers of the base.

    Raises:
        ValueError: for an option that is not allowed.
    """

    num_streams: int = 4
    variant: str = "kromhc"
    init: str = "identity"
    readout: str = "mean"
    dynamic: bool = True
    residual_logit: float = 4.0
    eps: float = 1e-6
    base_model_type: str | None = None
    base_hidden_size: int | None = None
    base_num_layers: int | None = None
    target_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        make_mixing(self.variant, self.num_streams)
        check_init(self.init, self.readout)
        if self.readout not in ("mean", "sum"):
            raise ValueError(
                f"readout of an adapter must be mean or sum, since an adapter holds hyper-connections alone; "
                f"got {self.readout!r}. Convert the model for a learned readout."
            )
