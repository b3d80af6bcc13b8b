"""FSDP2 with hyper-connections that stay in fp32."""

from typing import Any

import torch
from torch import nn

from .hyper_connection import Float32Module
from .training import hyper_connection_parameters


def shard_hyper_connections(model: nn.Module, mesh: Any = None) -> nn.Module:
    """Makes every hyper-connection an FSDP2 unit of its own that computes in fp32, in place.

    Under a mixed precision policy, FSDP2 casts all parameters of a unit before the forward, which would round the
    coefficients to bf16 (8 bits) and end the exactness of the init; and parameters of one unit must have one dtype.
    Call it after the process group is there and before the rest of the model is sharded, by `accelerator.prepare`, a
    Trainer or `fully_shard`: all of them leave units alone that exist already. Needs `fsdp_cpu_ram_efficient_loading:
    false`.

    Args:
        model: a model with hyper-connections.
        mesh: the device mesh over which the rest will be sharded; all ranks if None.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no hyper-connections.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    hyper_connection_parameters(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, Float32Module):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return model
