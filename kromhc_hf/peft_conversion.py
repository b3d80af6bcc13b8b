"""The path at which these two were documented first; `kromhc_hf` itself exports them now."""

from .peft.conversion import adapter_to_model, model_to_adapter


__all__ = ["adapter_to_model", "model_to_adapter"]
