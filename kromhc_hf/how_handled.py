"""How a model would be handled, told before anything is done to it."""

from pathlib import Path

from .families_table import FamilyRow, describe, exactness, families_table
from .modeling.layer_spec import row_of
from .modeling.model_types import PREFIX


def how_handled(source: str, trust_remote_code: bool = False) -> FamilyRow:
    """One row of the table for a checkpoint; where no row describes its family, what could be derived.

    No weights are read.

    Args:
        source: folder or Hub id, or the name of a model type.
        trust_remote_code: whether code in the source may be run to look at it.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if its code would have to be trusted, or for the name of a model type without a row.
    """
    rows = {row.model_type: row for row in families_table()}
    if not Path(source).exists() and source in rows:
        return rows[source]

    # PyTorch, which takes seconds to import, is for what the table does not answer.
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .conversion.base import model_content
    from .conversion.files import resolve_source
    from .conversion.outside import is_loaded_by_own_code
    from .derivation import derived_row

    if not Path(source).exists() and source in CONFIG_MAPPING:
        raise ValueError(
            f"model type {source!r} has no row, neither of a supported family nor of a refused one. Give the folder or "
            "Hub id of such a model to see whether a row can be derived."
        )
    folder = resolve_source(source, code=trust_remote_code, weights=False)
    content = model_content(folder)
    model_type = str(content.get("model_type", "")).removeprefix(PREFIX)
    if model_type in rows:
        return _of_configuration(rows[model_type], folder)
    code = is_loaded_by_own_code(content, folder, trust_remote_code)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    if not code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return FamilyRow(model_type, False, "transformers has no causal language model of this type", "")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=code)
    try:
        row = derived_row(model)
    except ValueError as error:
        return FamilyRow(model_type, False, str(error), "")
    return FamilyRow(model_type, True, describe(row), "by a row derived with --derive, if its check holds")


def _of_configuration(row: FamilyRow, folder: Path) -> FamilyRow:
    """What a row of the table is for the configuration of a checkpoint, by which some families differ."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from .modeling.layer_fit import layer_specs

    # Of a family from outside the configuration may need its code.
    if not row.supported or row.model_type not in CONFIG_MAPPING:
        return row
    config = AutoConfig.from_pretrained(folder).get_text_config()
    try:
        specs = layer_specs(config, config.model_type.removeprefix(PREFIX))
    except ValueError as error:
        return row._replace(supported=False, description=str(error), exactness="")
    found = row_of(specs)
    return row._replace(description=describe(found), exactness=exactness(found))
