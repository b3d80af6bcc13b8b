# Code of kromhc-hf, which travels with every model that it saves.
"""The hyper-connection of one residual branch: it computes the mappings, reads the streams and writes them back."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .generators import GENERATORS
from .kernels import check_kernel, described, select_connect
from .kernels_eager import project_reference, without_autocast
from .mixing import cast
from .options import BRANCH_OPTIONS, BranchKeywords, StreamOptions, show_options
from .read_gate import gate_shapes, gated_part, initial_gate
from .stream_module import INITIAL_ALPHA, StreamModule, new_parameter


if TYPE_CHECKING:
    from typing import Unpack


class Mappings(NamedTuple):
    """The three mappings of a hyper-connection for given streams."""

    h_pre: Tensor  # [B, S, n]
    h_post: Tensor  # [B, S, n]
    h_res: Tensor  # [B, S, n, n]


def optional_cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in this dtype, if there is one."""
    return None if tensor is None else cast(tensor, dtype)


def coefficients_dtype(own: torch.dtype, streams: torch.dtype) -> torch.dtype:
    """What coefficients are computed in, from parameters and for streams of these dtypes."""
    if own == streams and own.itemsize >= 4:
        return own
    return torch.promote_types(torch.promote_types(own, streams), torch.float32)


def _fitting(branch_output: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A branch output as it is added to a residual of this shape.

    Raises:
        ValueError: if it does not broadcast to it: tokens would be taken for others.
    """
    if branch_output.shape == shape:
        return branch_output
    sizes = zip(reversed(branch_output.shape), reversed(shape))
    if branch_output.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in sizes):
        raise ValueError(
            f"the output of a branch must have the shape of its input, {list(shape)}; got {list(branch_output.shape)}. "
            "Bring its dimensions into that order before it is written."
        )
    return branch_output.expand(shape)


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
        branch_index: which branch of the model this is; the init favours stream `branch_index % n`.
        kernel: what reads and writes the streams: "auto" (Triton on a CUDA device, if it is installed and agrees with
            plain PyTorch in a check of a moment; otherwise plain PyTorch), "torch" (plain PyTorch), "triton" (refused
            where it cannot run), or "reference" (operations that autograd knows and nothing else: slow, and
            differentiable in every way). It can be set later, as the attribute `kernel`.
        **options: what a single hyper-connection reads of `StreamOptions`. Static mappings (`dynamic=False`) have no
            `weight` and no `alpha`; with another generator than "dense", the weight is made of factors.

    Raises:
        ValueError: for an option that is not allowed, such as a number of streams that the variant is not defined for.
    """

    weight: nn.Parameter | None
    read_down: nn.Parameter | None
    read_up: nn.Parameter | None

    @show_options(BranchKeywords)
    def __init__(
        self,
        hidden_size: int,
        num_streams: int,
        *,
        branch_index: int = 0,
        kernel: str = "auto",
        device: torch.device | str | None = None,
        **options: "Unpack[BranchKeywords]",
    ):
        super().__init__()
        check_kernel(kernel)
        if unknown := options.keys() - BRANCH_OPTIONS.keys():
            raise TypeError(
                f"a hyper-connection takes the options {', '.join(BRANCH_OPTIONS)}; got {', '.join(sorted(unknown))}. "
                "Others are of the whole model, see apply_hyper_connections."
            )
        chosen = StreamOptions(num_streams=num_streams, **options)
        self.options, self.mixing = chosen.of_branch(), chosen.mixing()
        self.kernel, self.branch_index = kernel, branch_index
        self.hidden_size, self.num_streams, self.eps = hidden_size, num_streams, chosen.eps

        def parameter(*shape: int, wanted: bool = True) -> nn.Parameter | None:
            return new_parameter(*shape, device=device) if wanted and num_streams > 1 else None

        dynamic = chosen.dynamic
        self.bias = parameter(sum(self.mixing.sizes))
        self.register_parameter("weight", None)
        self.generator = GENERATORS[chosen.generator]
        self.weight_shapes = self.generator.shapes(self.mixing, hidden_size, chosen.generator_rank)
        for name, shape in self.weight_shapes.items():
            self.register_parameter(name, parameter(*shape, wanted=dynamic))
        self.alpha = parameter(3, wanted=dynamic)
        for name, shape in gate_shapes(num_streams, hidden_size, chosen.read_rank).items():
            self.register_parameter(name, parameter(*shape, wanted=chosen.read == "gated"))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.bias is not None:
            options = self.options
            bias = self.mixing.initial_bias(options["init"], self.branch_index, options["residual_logit"])
            init.copy_(self.bias, bias.to(self.bias.device))
        if self.alpha is not None:
            initial = self.generator.initial(self.weight_shapes, self.branch_index)
            for name in self.weight_shapes:
                part = self.get_parameter(name)
                if name in initial:
                    init.copy_(part, initial[name].to(part.device))
                else:
                    init.zeros_(part)
            init.constant_(self.alpha, INITIAL_ALPHA)
        if self.read_down is not None and self.read_up is not None:
            init.copy_(self.read_down, initial_gate(self.read_down.shape, self.branch_index).to(self.read_down.device))
            init.zeros_(self.read_up)

    def forward(self, streams: Tensor, branches: int = 0) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Width connection: reads the branch input from the streams `[B, S, n, C]`.

        Args:
            streams: what the hyper-connection before has written, or the first streams.
            branches: of so many branches that follow each other only the first keeps its streams for the backward pass
                (option `stream_recompute`); with 0 or 1 all do.

        Returns:
            The branch input `[B, S, C]`, and the depth connection `write`: it takes the branch output `[B, S, C]`, or
            one that broadcasts to it, and returns the new streams `[B, S, n, C]`.

        Raises:
            ValueError: if the streams are not `[..., n, C]`, and by `write`, if the branch output does not fit.
        """
        if streams.shape[-2:] != (self.num_streams, self.hidden_size):
            raise ValueError(
                f"streams must be [B, S, n, C] with n = {self.num_streams} and C = {self.hidden_size}; got "
                f"{list(streams.shape)}. Make the first ones with expand(hidden_states, {self.num_streams})."
            )
        shape = (*streams.shape[:-2], self.hidden_size)
        if self.num_streams == 1:
            return streams.squeeze(-2), lambda output: streams + _fitting(output, shape).unsqueeze(-2)
        own = self.bias
        assert own is not None
        dtype = coefficients_dtype(own.dtype, streams.dtype)
        connect = select_connect(
            self.kernel, streams, dtype, self.num_streams, self.hidden_size, self.options["variant"]
        )
        # A compiler chooses by itself what it keeps, from the graph that it sees.
        branches = 0 if torch.compiler.is_compiling() else branches
        with without_autocast(streams):
            weight, bias, alpha = self._weight(dtype), cast(own, dtype), optional_cast(self.alpha, dtype)
            branch_input, write_back = connect(streams, weight, bias, alpha, self.mixing, self.eps, branches)
            if self.options["read"] == "gated":
                down, up = (cast(getattr(self, name), dtype) for name in ("read_down", "read_up"))
                added = gated_part(streams, down, up, self.eps)
                branch_input = cast(cast(branch_input, dtype) + added, streams.dtype)

        def write(branch_output: Tensor) -> Tensor:
            with without_autocast(streams):
                return write_back(_fitting(branch_output, shape))

        return branch_input, write

    def mappings(self, streams: Tensor) -> Mappings:
        """The mappings for the streams `[B, S, n, C]`, in at least fp32; for inspection."""
        leading, bias = streams.shape[:-2], self.bias
        dtype = coefficients_dtype(torch.float32 if bias is None else bias.dtype, streams.dtype)
        if self.num_streams == 1:
            one = torch.ones(*leading, 1, dtype=dtype, device=streams.device)
            return Mappings(one, one, one.unsqueeze(-1))
        assert bias is not None
        with without_autocast(streams):
            projected = project_reference(streams.to(dtype), self._weight(dtype), self.eps)
            alpha = optional_cast(self.alpha, dtype)
            return Mappings(*self.mixing.mappings(*projected, cast(bias, dtype), alpha, leading))

    def _weight(self, dtype: torch.dtype) -> Tensor | None:
        """What predicts the mappings, `[outputs, width]`; None if they are static."""
        if self.alpha is None:
            return None
        return self.generator.weight([cast(getattr(self, name), dtype) for name in self.weight_shapes], self.mixing)

    def extra_repr(self) -> str:
        mode = "dynamic" if self.options["dynamic"] else "static"
        sizes = f"{self.hidden_size}, num_streams={self.num_streams}"
        return f"{sizes}, variant={self.options['variant']!r}, {mode}, kernel={self.described_kernel()}"

    def described_kernel(self) -> str:
        """Which kernel was chosen, and what that is where the parameters are now, as `repr` shows it."""
        device = torch.device("cpu") if self.bias is None else self.bias.device
        return described(self.kernel, device, self.num_streams, self.options["variant"])
