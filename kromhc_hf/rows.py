"""The words in which the decoder layers of a family are described, for `register_family`."""

from .modeling.layer_spec import ByConfig, LayerSpec, Row, Step, Sublayer, block, recurrent, sequential


__all__ = ["ByConfig", "LayerSpec", "Row", "Step", "Sublayer", "block", "recurrent", "sequential"]
