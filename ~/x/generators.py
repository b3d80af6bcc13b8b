# Code of kromhc-hf, which travels with every model that it saves.
"""How the weight that predicts the mappings is stored: as it is, or as factors of low rank, a class each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .mixing import Mixing


class DenseGenerator:
    """The weight itself, `[outputs, width]`, which starts at 0."""

    @staticmethod
    def check_defined_for(mixing: Mixing) -> None:
        """Refuses variants whose weight cannot be stored so; here none.

        Raises:
            ValueError: with the rule, the value and the way out.
        """

    @staticmethod
    def shapes(mixing: Mixing, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
        """The parameters by name."""
        return {"weight": mixing.weight_shape(hidden_size)}

    @staticmethod
    def initial(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
        """The values to start with of those that do not start at 0."""
        return {}

    @staticmethod
    def weight(parameters: Sequence[Tensor], mixing: Mixing) -> Tensor:
        """The weight `[outputs, width]`, of the parameters in the order of `shapes`."""
        return parameters[0]


class CPGenerator(DenseGenerator):
    """A sum of `rank` products of an output, a stream and a feature factor, for each mapping by itself (TEMPER).

    `weight[k, j * C + c] = sum_r outputs[r, k] streams[g, r, j] features[g, r, c]`, where output k belongs to mapping
    g: reading, writing or mixing. That takes `rank (2 n + C)` numbers each for reading and writing, and
    `rank (n + C + num_logits)` for mixing. The output factors start at 0, and so does the weight; the others are
    standard normal, drawn by branch, the same in every run, since factors that are all 0 would never train.
    """

    @staticmethod
    def check_defined_for(mixing: Mixing) -> None:
        if not mixing.plain_gates:
            raise ValueError(
                "generator must be 'dense' for a variant with one weight of width C for all streams, such as 'hc', "
                "which leaves no stream factor to take out; got 'cp'. Use generator='dense', or another variant."
            )

    @staticmethod
    def shapes(mixing: Mixing, hidden_size: int, rank: int) -> dict[str, tuple[int, ...]]:
        groups = sum(size > 0 for size in mixing.sizes)
        return {
            "weight_outputs": (rank, sum(mixing.sizes)),
            "weight_streams": (groups, rank, mixing.num_streams),
            "weight_features": (groups, rank, hidden_size),
        }

    @staticmethod
    def initial(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shapes[name], generator=generator, dtype=torch.float32, device="cpu")
            for name in ("weight_streams", "weight_features")
        }

    @staticmethod
    def weight(parameters: Sequence[Tensor], mixing: Mixing) -> Tensor:
        outputs, streams, features = parameters
        basis = (streams.unsqueeze(-1) * features.unsqueeze(-2)).flatten(-2)  # [groups, rank, n * C]
        parts = outputs.split([size for size in mixing.sizes if size], dim=-1)
        return torch.cat([part.t() @ rows for part, rows in zip(parts, basis.unbind())])


GENERATORS: dict[str, type[DenseGenerator]] = {"dense": DenseGenerator, "cp": CPGenerator}
