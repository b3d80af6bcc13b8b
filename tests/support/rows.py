"""The row of the table of families that a model type without one fits."""

import copy

import torch
from support.tiny import configurations, make_model, token_ids

from kromhc_hf import apply_hyper_connections
from kromhc_hf.modeling import configuration_kromhc
from kromhc_hf.modeling.families import SUPPORTED


def fitting_row(model_type: str) -> str | None:
    """The first supported model type whose row makes this one compute the same logits, bitwise; None if none does.

    Args:
        model_type: one that is neither in SUPPORTED nor in REFUSED.

    Raises:
        Exception: if no tiny model of it can be made, see `SPECIAL` in support/tiny.py.
    """
    config = configurations(model_type)[0]
    ids = token_ids(config)
    with torch.no_grad():
        native = make_model(copy.deepcopy(config))(input_ids=ids, use_cache=False).logits
        for name, row in tuple(SUPPORTED.items()):
            SUPPORTED[model_type] = row
            try:
                model = apply_hyper_connections(make_model(copy.deepcopy(config)))
                if torch.equal(model(input_ids=ids, use_cache=False).logits, native):
                    return name
            except Exception:  # a row of another family may fail in any way
                continue
            finally:
                del SUPPORTED[model_type]
                configuration_kromhc._CLASSES.pop(model_type, None)
    return None


def proposal(model_type: str) -> str:
    """What to do about a model type without a row."""
    try:
        name = fitting_row(model_type)
    except Exception as error:
        return f"no tiny model of it can be made ({type(error).__name__}: {error}); give it one in support/tiny.py"
    if name is None:
        return "it fits no row that there is; write one, or put a reason into REFUSED"
    return f"the row of {name} fits it, bitwise"
