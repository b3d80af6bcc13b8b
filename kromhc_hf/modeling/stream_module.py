# Code of kromhc-hf, which travels with every model that it saves.
"""What all modules around the streams share: parameters that stay fp32 whatever dtype the model is loaded in."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


# In front of what is predicted from the streams; a zero next to a zero weight would never train.
INITIAL_ALPHA = 0.01


class StreamModule(nn.Module):
    """A module of the hyper-connections: its parameters stay fp32 (or wider) whatever `.to(dtype)` asks for.

    Mappings computed from 16-bit parameters miss double stochasticity by 1e-2 of mass per layer.
    """

    def reset_parameters(self) -> None:
        """Puts the parameters to their initial values, except those that a checkpoint has already filled."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StreamModule":
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device, torch.float32)

        return super()._apply(keep_wide, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the parameters would become what the file holds.
        for name in self._parameters:
            tensor = state_dict.get(prefix + name)
            if isinstance(tensor, Tensor) and tensor.dtype.itemsize < 4:
                state_dict[prefix + name] = tensor.float()
        super()._load_from_state_dict(state_dict, prefix, *args)


def new_parameter(*shape: int, device: torch.device | str | None = None) -> nn.Parameter:
    """An uninitialised parameter; the dtype is explicit because models are built under their own default dtype."""
    # Made in inference mode it could never be trained.
    with torch.inference_mode(False):
        return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
