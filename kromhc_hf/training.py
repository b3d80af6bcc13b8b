"""What training needs beside an optimizer: parameter groups, a frozen backbone, the hyper-connections' own state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .modeling.stream_module import StreamModule


# 3e-3 for the hyper-connections beside 1e-4 for LoRA on the backbone: "mHC for PEFT", arXiv 2607.18130.
LEARNING_RATE_RATIO = 30.0


def hyper_connection_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all hyper-connections and learned ends of the streams, wrapped or not, in the order of modules.

    Raises:
        ValueError: if there are none.
    """
    # `original_module` is PEFT's name for what an entry of modules_to_save stands in for; it is never trained.
    connections = [
        module
        for path, module in model.named_modules()
        if isinstance(module, StreamModule) and "original_module" not in path.split(".")
    ]
    parameters = [parameter for connection in connections for parameter in connection.parameters()]
    if not parameters:
        raise _without_parameters(model, len(connections))
    return parameters


def _without_parameters(model: nn.Module, number: int) -> ValueError:
    return ValueError(
        f"model must have hyper-connections with parameters; got {type(model).__name__} with {number} "
        "hyper-connections and no parameter in them. Call apply_hyper_connections(model, num_streams=4) first."
    )


def optimizer_param_groups(
    model: nn.Module, lr: float, hyper_connection_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for any `torch.optim` optimizer: hyper-connections apart, at 30 times the learning rate, without decay.

    The ratio is the published one (3e-3 beside 1e-4, arXiv 2607.18130). In the backbone, matrices are decayed, and
    norms and biases are not. Frozen parameters are left out, and so are groups without parameters.

    Args:
        model: a model with hyper-connections, also in PEFT, DDP, FSDP2 or torch.compile, or partitioned by ZeRO-3.
        lr: learning rate of the backbone.
        hyper_connection_lr: learning rate of the hyper-connections, `30 * lr` if None.
        weight_decay: for the matrices of the backbone.

    Returns:
        Groups with the keys `params`, `name`, `lr` and `weight_decay`; the names are "backbone",
        "backbone_without_decay" and "hyper_connections".

    Raises:
        ValueError: if the model has no hyper-connections, or all of its parameters are frozen.
    """
    own = {id(parameter) for parameter in hyper_connection_parameters(model)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    backbone = [parameter for parameter in trainable if id(parameter) not in own]
    hyper_connection_lr = LEARNING_RATE_RATIO * lr if hyper_connection_lr is None else hyper_connection_lr
    groups = [
        ("backbone", [p for p in backbone if len(whole_shape(p)) > 1], lr, weight_decay),
        ("backbone_without_decay", [p for p in backbone if len(whole_shape(p)) <= 1], lr, 0.0),
        ("hyper_connections", [p for p in trainable if id(p) in own], hyper_connection_lr, 0.0),
    ]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} must have parameters to train; all are frozen. "
            "Use freeze_backbone(model) to train the hyper-connections alone."
        )
    return [
        {"params": params, "name": name, "lr": rate, "weight_decay": decay}
        for name, params, rate, decay in groups
        if params
    ]


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also where DeepSpeed ZeRO-3 has left an empty one in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


class HyperConnectionTrainerMixin:
    """Gives a Trainer's optimizer a group for the hyper-connections, at 30 times `learning_rate` and without decay.

    `class MyTrainer(HyperConnectionTrainerMixin, Trainer): pass`, and likewise with TRL's trainers. Everything else
    about the optimizer is what the Trainer makes of its arguments. An optimizer passed in by the caller is left alone.

    Attributes:
        hyper_connection_lr: set it in the class or on the trainer for another learning rate than `30 * learning_rate`.

    Raises:
        ValueError: from `create_optimizer`, if the model has no hyper-connections.
    """

    hyper_connection_lr: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimizer, with the hyper-connections moved to a group of their own."""
        trainer: Any = self
        passed_in = trainer.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if not passed_in:
            model = kwargs.get("model") or (args[0] if args else trainer.model)
            rate = self.hyper_connection_lr
            rate = LEARNING_RATE_RATIO * trainer.args.learning_rate if rate is None else rate
            _separate(optimizer, hyper_connection_parameters(model), rate)
        return optimizer


def _separate(optimizer: Any, parameters: list[nn.Parameter], lr: float) -> None:
    """Moves parameters from the groups they are in to a new group without weight decay."""
    own = {id(parameter) for parameter in parameters}
    moved = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in own]
    if moved:
        optimizer.add_param_group({"params": moved, "lr": lr, "weight_decay": 0.0})


def freeze_backbone(model: Any) -> Any:
    """Leaves the hyper-connections alone trainable, in place.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no hyper-connections.
    """
    parameters = hyper_connection_parameters(model)
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return model


def hyper_connection_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the hyper-connections alone, under the keys that they have in the unwrapped model's state dict.

    A few MB that, with the base checkpoint, make the whole model again: see `load_hyper_connection_state_dict`.
    Sharded tensors are gathered, so with FSDP2 and ZeRO-3 call it on every rank.

    Raises:
        ValueError: if the model has no hyper-connections.
    """
    model = unwrapped(model)
    connections = {path: module for path, module in model.named_modules() if isinstance(module, StreamModule)}
    if not connections:
        raise _without_parameters(model, 0)
    # Those of the plain model, with one stream, have none.
    return {
        f"{path}.{name}": gathered(parameter)
        for path, module in connections.items()
        for name, parameter in module.named_parameters()
    }


def gathered(parameter: Tensor) -> Tensor:
    """The whole of a parameter, which FSDP2 or ZeRO-3 may have spread over the ranks; then all of them must ask."""
    if hasattr(parameter, "ds_shape"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    tensor: Any = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(parameter: Tensor) -> bool:
    """Whether this rank holds a part of a parameter alone."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_shape")


def load_hyper_connection_state_dict(model: nn.Module, tensors: Mapping[str, Tensor], source: Any = "tensors") -> None:
    """The inverse of `hyper_connection_state_dict`: puts tensors into the hyper-connections of a model, all or none.

    Args:
        model: a model with hyper-connections.
        tensors: what `hyper_connection_state_dict` returned, of a model with the same options.
        source: where they come from, for the message.

    Raises:
        ValueError: naming the first tensor that is missing, unknown or of another shape, or if the model is sharded;
            nothing is changed then.
    """
    connections = (module for module in model.modules() if isinstance(module, StreamModule))
    if any(sharded(parameter) for module in connections for parameter in module.parameters()):
        raise ValueError(
            f"{type(model).__name__} must not be sharded yet; got parameters that are spread over ranks. Load the "
            "hyper-connections first, then shard the model."
        )
    expected = hyper_connection_state_dict(model)
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = (list(t[name].shape) if name in t else None for t in (tensors, expected))
        if found != wanted:
            raise ValueError(
                f"{source} must hold {name!r} with shape {wanted}, to fit {type(model).__name__}; got {found}. "
                "Give the base that the hyper-connections were made for."
            )
    unwrapped(model).load_state_dict(tensors, strict=False)


def unwrapped(model: Any) -> Any:
    """The model inside DDP and torch.compile wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


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
        ValueError: if the model has no hyper-connections, or DeepSpeed has partitioned it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if any(hasattr(parameter, "ds_shape") for parameter in hyper_connection_parameters(model)):
        raise ValueError(
            f"{type(model).__name__} must not be partitioned by DeepSpeed ZeRO-3, which shards hyper-connections as "
            "they are. Leave shard_hyper_connections, which is for FSDP2, out."
        )
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, StreamModule):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return model
