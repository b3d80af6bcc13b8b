"""Whether a base and a converted checkpoint can be compared, and in which dtype."""

from typing import Any

import torch

from ..modeling.configuration_kromhc import KromHCConfig
from ..modeling.connection_plan import find_decoder, present_plan
from ..training import hyper_connection_state_dict
from .stored_model import StoredModel, family_of


def checked_pair(base: StoredModel, converted: StoredModel) -> Any:
    """Refuses two checkpoints of which one cannot have been made from the other.

    Returns:
        The converted model on the meta device.

    Raises:
        ValueError: naming the first difference: no hyper-connections, another family, head, vocabulary, or shape.
    """
    rule = f"{converted.name} must be a converted form of {base.name}"
    if not isinstance(converted.config, KromHCConfig):
        raise ValueError(
            f"the second model must have hyper-connections; got model_type {converted.config.model_type!r} in "
            f"{converted.name}. Give the base first and the converted checkpoint second."
        )
    families = [family_of(model.config).model_type for model in (base, converted)]
    if families[0] != families[1]:
        raise ValueError(f"{rule}; the one is {families[1]!r}, the other {families[0]!r}. Give the base of this model.")
    if base.face is not converted.face:
        raise ValueError(
            f"{rule}; the one has the head of {converted.face.__name__}, the other that of {base.face.__name__}. "
            "Convert the base again, or correct architectures in config.json of the one that is wrong."
        )
    sizes = [model.config.get_text_config().vocab_size for model in (base, converted)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{rule}; the one has {sizes[1]:,} tokens in its vocabulary, the other {sizes[0]:,}, so their outputs "
            "cannot be compared. Verify it before tokens are added, or give the base the same ones."
        )
    skeletons = [model.skeleton() for model in (base, converted)]
    shapes, others = ({n: tuple(t.shape) for n, t in model.state_dict().items()} for model in skeletons)
    names = [*shapes, *(others.keys() - hyper_connection_state_dict(skeletons[1]).keys())]
    different = next((name for name in names if shapes.get(name) != others.get(name)), None)
    if different is not None:
        raise ValueError(
            f"{rule}; {different} has the shape {others.get(different)} in the one and {shapes.get(different)} in the "
            "other. Give the base of this model."
        )
    return skeletons[1]


def comparable_dtype(dtype: torch.dtype | str, converted: Any) -> torch.dtype | str:
    """The dtype in which base and converted model compute the same, or differ by no more than rounding in fp32.

    Args:
        dtype: what the user asks for; "auto" is the one they are stored in.
        converted: the converted model, which may be on the meta device.

    Raises:
        ValueError: if equal functions would differ in this dtype.
    """
    if all(spec.exact for spec in present_plan(find_decoder(converted)).specs):
        return dtype
    if dtype == "auto":
        return torch.float32
    if str(dtype).removeprefix("torch.") not in ("float32", "float64"):
        raise ValueError(
            f"dtype must be float32 for {family_of(converted.config).model_type}, whose layers add their branches in "
            f"another order: in half precision equal functions differ. Got {dtype}. Leave dtype out, or use float32."
        )
    return dtype
