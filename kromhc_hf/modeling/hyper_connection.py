# Code of kromhc-hf, which travels with every model that it saves.
"""The hyper-connection of one residual branch: it computes the mappings, reads the streams and writes them back."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .kernels import (
    TritonWrite,
    UnwrittenStreams,
    check_kernel,
    connect_triton,
    connect_unwritten,
    fuses,
    select_connect,
)
from .kernels_eager import without_autocast
from .mixing import SINKHORN_ITERATIONS, cast, snapped_sum
from .variants import make_mixing


INITS = ("identity", "paper")
READOUTS = ("mean", "sum", "norm_sum", "softmax", "sigmoid", "attention")

INITIAL_ALPHA = 0.01


class Mappings(NamedTuple):
    """The three mappings of a hyper-connection for given streams."""

    h_pre: Tensor  # [B, S, n]
    h_post: Tensor  # [B, S, n]
    h_res: Tensor  # [B, S, n, n]


def expand(hidden_states: Tensor, num_streams: int) -> Tensor:
    """Makes n equal streams: `[B, S, C]` -> `[B, S, n, C]`, a view."""
    return hidden_states.unsqueeze(-2).expand(*hidden_states.shape[:-1], num_streams, hidden_states.shape[-1])


def readout(streams: Tensor, kind: str) -> Tensor:
    """Joins the streams: `[B, S, n, C]` -> `[B, S, C]`, their mean or sum, accumulated in at least fp32.

    The mean of equal streams is bitwise that stream.
    """
    wide = streams.to(torch.promote_types(streams.dtype, torch.float32))
    if kind in ("sum", "norm_sum"):
        return wide.sum(-2).to(streams.dtype)
    first = wide[..., :1, :]
    return (first + (wide - first).mean(-2, keepdim=True)).squeeze(-2).to(streams.dtype)


def read(streams: Tensor, h_pre: Tensor) -> Tensor:
    """`sum_j h_pre[j] streams[j]`: `[B, S, n, C]` and `[B, S, n]` -> `[B, S, C]`.

    Written as `total * first + sum_j h_pre[j] (streams[j] - first)`: where the streams are equal and the weights sum
    to 1, up to 4 eps of rounding, the result is bitwise that stream.
    """
    first = streams[..., :1, :]
    rest = h_pre[..., 1:].unsqueeze(-1) * (streams[..., 1:, :] - first)
    return snapped_sum(h_pre) * first.squeeze(-2) + rest.sum(-2)


def optional_cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in this dtype, if there is one."""
    return None if tensor is None else cast(tensor, dtype)


def check_init(name: str, readout_kind: str = "mean") -> None:
    """Refuses unknown inits and readouts, and the pair that would break the promise of the identity init.

    Raises:
        ValueError: with the rule, the value and the way out.
    """
    if name not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}; got {name!r}.")
    if readout_kind not in READOUTS:
        raise ValueError(f"readout must be one of {', '.join(READOUTS)}; got {readout_kind!r}.")
    if name == "identity" and readout_kind in ("sum", "norm_sum"):
        raise ValueError(
            "init 'identity' keeps the function of the base model only if the readout weights sum to 1; "
            f"got readout {readout_kind!r}. Use readout='mean', or init='paper' to train from scratch."
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether anything but the forward of its class sees what the module is called with."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    # Offloading puts a forward of its own on the instance.
    return any(hooks) or "forward" in vars(module) or bool(nn.modules.module._has_any_global_hook())


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


class HyperConnection(StreamModule):
    r"""Hyper-connection around one residual branch `F`, with a constrained `h_res` (arXiv 2601.21579, eq. 5-9).

        streams [B, S, n, C] --+-- h_pre ---> branch_input [B, S, C] --> F --> branch_output [B, S, C]
                               |                                                        | h_post
                               +-- h_res ---> mixed [B, S, n, C] --------------------- (+) --> streams [B, S, n, C]

        x'     = RMSNorm(vec(streams)), over all n * C features, the gain folded into `weight`
        h_pre  = sigmoid(alpha[0] * weight_pre x' + bias_pre)         [n]
        h_post = 2 * sigmoid(alpha[1] * weight_post x' + bias_post)   [n]
        h_res  = mixing(alpha[2] * weight_res x' + bias_res)          [n, n]

    Coefficients are computed in fp32 (or wider), and the parameters stay fp32 whatever `.to(dtype)` asks for. With one
    stream there is nothing to learn: the module has no parameters and is the plain residual connection.

    Args:
        hidden_size: C.
        num_streams: n.
        variant: name of the parametrisation of `h_res`.
        branch_index: which branch of the model this is; the init favours stream `branch_index % n`.
        init: "identity" leaves the function of a pretrained model unchanged, bit for bit; "paper" is the published
            one, for training from scratch.
        residual_logit: with init "identity", minus the initial logit of every non-identity permutation; "paper"
            fixes it at 8.
        dynamic: whether the mappings depend on the streams; without, `weight` and `alpha` are None.
        eps: added to the mean square inside the RMS norm.
        sinkhorn_iterations: how often variant "mhc" normalises rows and columns.
        kernel: what reads and writes the streams: "torch" (plain PyTorch), "triton" (refused where it cannot run), or
            "auto" (Triton on a CUDA device, if it is installed). It can be set later, as the attribute `kernel`. The
            default is "torch" until the Triton kernels have been measured on a GPU.

    Raises:
        ValueError: for an unknown variant, init or kernel, or a number of streams that the variant does not allow.
    """

    def __init__(
        self,
        hidden_size: int,
        num_streams: int,
        *,
        variant: str = "kromhc",
        branch_index: int = 0,
        init: str = "identity",
        residual_logit: float = 4.0,
        dynamic: bool = True,
        eps: float = 1e-6,
        sinkhorn_iterations: int = SINKHORN_ITERATIONS,
        kernel: str = "torch",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        check_init(init)
        check_kernel(kernel)
        self.kernel = kernel
        self.mixing = make_mixing(variant, num_streams, sinkhorn_iterations)
        self.hidden_size, self.num_streams, self.variant = hidden_size, num_streams, variant
        self.branch_index, self.init, self.residual_logit = branch_index, init, residual_logit
        self.dynamic, self.eps = dynamic, eps

        # The dtype is explicit because models are built under their own default dtype.
        def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
            wanted = wanted and num_streams > 1
            return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)) if wanted else None

        self.bias = parameter(sum(self.mixing.sizes))
        self.weight = parameter(*self.mixing.weight_shape(hidden_size), wanted=dynamic)
        self.alpha = parameter(3, wanted=dynamic)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.bias is not None:
            bias = self.mixing.initial_bias(self.init, self.branch_index, self.residual_logit)
            init.copy_(self.bias, bias.to(self.bias.device))
        if self.weight is not None and self.alpha is not None:
            init.zeros_(self.weight)
            # A zero alpha next to a zero weight would never train.
            init.constant_(self.alpha, INITIAL_ALPHA)

    def forward(self, streams: Tensor | UnwrittenStreams) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Width connection: reads the branch input from the streams `[B, S, n, C]`.

        Streams that the hyper-connection before has not written yet are written here, where `writes_first` says so.

        Returns:
            The branch input `[B, S, C]`, and the depth connection `write`: it takes the branch output `[B, S, C]` and
            returns the new streams `[B, S, n, C]`.
        """
        if isinstance(streams, UnwrittenStreams):
            assert self.weight is not None
            assert self.bias is not None
            assert self.alpha is not None
            with without_autocast(streams.branch_output):
                return connect_unwritten(streams, self.weight, self.bias, self.alpha, self.mixing, self.eps)
        if self.num_streams == 1:
            return streams.squeeze(-2), lambda branch_output: streams + branch_output.unsqueeze(-2)
        dtype = self._dtype(streams)
        connect = select_connect(self.kernel, streams, dtype)
        weight, bias, alpha = (optional_cast(p, dtype) for p in (self.weight, self.bias, self.alpha))
        assert bias is not None
        with without_autocast(streams):
            branch_input, write_back = connect(streams, weight, bias, alpha, self.mixing, self.eps)
        if isinstance(write_back, TritonWrite):
            return branch_input, write_back

        def write(branch_output: Tensor) -> Tensor:
            with without_autocast(streams):
                return write_back(branch_output)

        return branch_input, write

    def writes_first(self, write: Callable[[Tensor], Tensor]) -> bool:
        """Whether `forward` takes `UnwrittenStreams` of this depth connection, and nobody else would see them."""
        if self.kernel == "torch" or not isinstance(write, TritonWrite) or has_hooks(self):
            return False
        if write.tokens.shape[1] != self.num_streams or not fuses(self.weight, self.mixing):
            return False
        return select_connect(self.kernel, write.tokens, self._dtype(write.tokens)) is connect_triton

    def mappings(self, streams: Tensor) -> Mappings:
        """The mappings for the streams `[B, S, n, C]`, in at least fp32; for inspection."""
        leading, dtype = streams.shape[:-2], self._dtype(streams)
        if self.num_streams == 1:
            one = torch.ones(*leading, 1, dtype=dtype, device=streams.device)
            return Mappings(one, one, one.unsqueeze(-1))
        assert self.bias is not None
        with torch.autocast(streams.device.type, enabled=False):
            projected = self._projected(streams.to(dtype))
            return Mappings(*self.mixing.mappings(*projected, self.bias, self.alpha, self.eps, leading))

    def _dtype(self, streams: Tensor) -> torch.dtype:
        """What coefficients are computed in."""
        bias = self.bias
        own = torch.float32 if bias is None else bias.dtype
        if streams.dtype == own and own.itemsize >= 4:
            return own
        return torch.promote_types(torch.promote_types(own, streams.dtype), torch.float32)

    def _projected(self, wide: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The products of the features with the weight `[..., G, outputs]` and their mean squares `[..., G]`."""
        if self.weight is None:
            return None, None
        features = wide.flatten(-2).unflatten(-1, (-1, self.weight.shape[1]))
        return F.linear(features, self.weight.to(wide.dtype)), features.square().mean(-1)

    def extra_repr(self) -> str:
        mode = "dynamic" if self.dynamic else "static"
        sizes = f"{self.hidden_size}, num_streams={self.num_streams}"
        return f"{sizes}, variant={self.variant!r}, {mode}, kernel={self.kernel!r}"
