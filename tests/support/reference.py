"""The slow, obvious twins: hyper-connections written from the equations, token by token, with loops and torch.kron.

Nothing here is shared with the package. Streams are `[n, C]`, matrices act as `out[i] = sum_j h_res[i, j] streams[j]`.
"""

import itertools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def permutation_matrices(size: int) -> list[Tensor]:
    """All permutation matrices, the identity first; `order` takes row i to column order[i]."""
    matrices = []
    for order in itertools.permutations(range(size)):
        matrix = torch.zeros(size, size, dtype=torch.float64)
        for row, column in enumerate(order):
            matrix[row, column] = 1
        matrices.append(matrix)
    return matrices


def birkhoff(logits: Tensor, size: int) -> Tensor:
    """sum_m softmax(logits)[m] P_m, with one logit per permutation."""
    weights = torch.softmax(logits, dim=0)
    return sum(weight * matrix for weight, matrix in zip(weights, permutation_matrices(size), strict=True))


def pinned(logits: Tensor) -> Tensor:
    """With the identity's logit, 0, in front."""
    return torch.cat([logits.new_zeros(1), logits])


def prime_factors(n: int) -> list[int]:
    return [] if n == 1 else next([p, *prime_factors(n // p)] for p in range(2, n + 1) if n % p == 0)


def kromhc_matrix(logits: Tensor, n: int) -> Tensor:
    h_res, start = torch.ones(1, 1, dtype=torch.float64), 0
    for size in prime_factors(n):
        count = math.factorial(size) - 1
        h_res = torch.kron(h_res, birkhoff(pinned(logits[start : start + count]), size))
        start += count
    return h_res


def mhc_matrix(logits: Tensor, n: int, iterations: int = 20) -> Tensor:
    h_res = logits.reshape(n, n).exp()
    for _ in range(iterations):
        h_res = h_res / h_res.sum(1, keepdim=True)
        h_res = h_res / h_res.sum(0, keepdim=True)
    return h_res


def mhc_lite_matrix(logits: Tensor, n: int) -> Tensor:
    return birkhoff(pinned(logits), n)


def tbp_matrix(logits: Tensor, n: int) -> Tensor:
    t = logits.reshape(n - 1, n - 1)
    rows, columns = [torch.tensor(1.0, dtype=torch.float64)] * n, [torch.tensor(1.0, dtype=torch.float64)] * n
    h_res = [[torch.tensor(0.0, dtype=torch.float64)] * n for _ in range(n)]
    for i in range(n - 1):
        for j in range(n - 1):
            low = max(0 * rows[i], rows[i] - sum(columns[j + 1 :]), columns[j] - sum(rows[i + 1 :]))
            high = min(rows[i], columns[j])
            h_res[i][j] = low + torch.sigmoid(t[i, j]) * (high - low)
            rows[i], columns[j] = rows[i] - h_res[i][j], columns[j] - h_res[i][j]
        h_res[i][n - 1] = rows[i]
        columns[n - 1] = columns[n - 1] - rows[i]
    h_res[n - 1] = columns
    return torch.stack([torch.stack(row) for row in h_res])


def one_sided_matrix(logits: Tensor, n: int) -> Tensor:
    """softmax over each row of the logits, whose diagonal is 0."""
    values = iter(logits)
    rows = [torch.stack([logits.new_zeros(()) if i == j else next(values) for j in range(n)]) for i in range(n)]
    return torch.stack([row.exp() / row.exp().sum() for row in rows])


def circulant_matrix(logits: Tensor, n: int) -> Tensor:
    """sum_k c_k P^k, with P[i, i + 1] = 1."""
    shift = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        shift[i, (i + 1) % n] = 1
    shares = torch.softmax(pinned(logits), dim=0)
    return sum(share * torch.linalg.matrix_power(shift, k) for k, share in enumerate(shares))


def rotation(entries: Tensor, size: int) -> Tensor:
    """(I - A) (I + A)^-1, with these entries of the skew-symmetric A above the diagonal, row by row."""
    identity, values = torch.eye(size, dtype=torch.float64), iter(entries)
    skew = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(i + 1, size):
            unit = torch.outer(identity[i], identity[j])
            skew = skew + next(values) * (unit - unit.T)
    return (identity - skew) @ torch.linalg.inv(identity + skew)


def go_mhc_matrix(logits: Tensor, n: int, s: int = 2) -> Tensor:
    """1 / s times the sum of the squares in each s x s block of a rotation of size n s."""
    q = rotation(logits, n * s)
    blocks = [[q[i * s : (i + 1) * s, j * s : (j + 1) * s] for j in range(n)] for i in range(n)]
    return torch.stack([torch.stack([(block**2).sum() / s for block in row]) for row in blocks])


MATRICES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "kromhc": kromhc_matrix,
    "identity": lambda logits, n: torch.eye(n, dtype=torch.float64),
    "mhc": mhc_matrix,
    "mhc_lite": mhc_lite_matrix,
    "tbp": tbp_matrix,
    "hc": lambda logits, n: logits.reshape(n, n),
    "one_sided": one_sided_matrix,
    "circulant": circulant_matrix,
    "go_mhc": go_mhc_matrix,
    "orthogonal": rotation,
}


def rms_norm(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps)


def mappings(variant: str, parameters: Mapping[str, Tensor], streams: Tensor, eps: float) -> tuple[Tensor, ...]:
    """h_pre [n], h_post [n] and h_res [n, n] for one token, from the parameters `bias`, `weight` and `alpha`."""
    n = streams.shape[0]
    bias, weight, alpha = parameters["bias"], parameters.get("weight"), parameters.get("alpha")
    pre, post, residual = bias[:n].clone(), bias[n : 2 * n].clone(), bias[2 * n :].clone()
    if weight is not None and variant == "hc":
        for j in range(n):
            predicted = torch.tanh(weight @ rms_norm(streams[j], eps))
            pre[j] += alpha[0] * predicted[0]
            post[j] += alpha[1] * predicted[1]
            for i in range(n):
                residual[i * n + j] += alpha[2] * predicted[2 + i]
    elif weight is not None:
        predicted = weight @ rms_norm(streams.reshape(-1), eps)
        pre += alpha[0] * predicted[:n]
        post += alpha[1] * predicted[n : 2 * n]
        residual += alpha[2] * predicted[2 * n :]
    if variant != "hc":
        pre, post = torch.sigmoid(pre), 2 * torch.sigmoid(post)
    return pre, post, MATRICES[variant](residual, n)


def connection(
    variant: str, parameters: Mapping[str, Tensor], streams: Tensor, branch: Callable[[Tensor], Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """The branch input [C] and the new streams [n, C] of one token, summed entry by entry."""
    n = streams.shape[0]
    h_pre, h_post, h_res = mappings(variant, parameters, streams, eps)
    branch_input = sum(h_pre[j] * streams[j] for j in range(n))
    branch_output = branch(branch_input)
    out = [sum(h_res[i, j] * streams[j] for j in range(n)) + h_post[i] * branch_output for i in range(n)]
    return branch_input, torch.stack(out)


def eager_kromhc(
    parameters: Mapping[str, Tensor], streams: Tensor, branch: Callable[[Tensor], Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """KromHC for a whole batch in plain tensor operations, streams `[B, S, n, C]` with n a power of 2."""
    n = streams.shape[-2]
    features = streams.flatten(-2)
    normed = features * torch.rsqrt(features.square().mean(-1, keepdim=True) + eps)
    alpha, sizes = parameters["alpha"], (n, n, len(prime_factors(n)))
    scale = torch.cat([a.expand(size) for a, size in zip(alpha.unbind(), sizes)])
    logits = parameters["bias"] + scale * (normed @ parameters["weight"].T)
    h_pre, h_post = torch.sigmoid(logits[..., :n]), 2 * torch.sigmoid(logits[..., n : 2 * n])
    h_res = torch.ones(*logits.shape[:-1], 1, 1, dtype=logits.dtype, device=logits.device)
    for swap in torch.sigmoid(logits[..., 2 * n :]).unbind(-1):
        factor = torch.stack([torch.stack([1 - swap, swap], -1), torch.stack([swap, 1 - swap], -1)], -2)
        h_res = torch.einsum("...ij,...kl->...ikjl", h_res, factor).flatten(-4, -3).flatten(-2, -1)
    branch_input = torch.einsum("...j,...jc->...c", h_pre, streams)
    out = h_res @ streams + h_post.unsqueeze(-1) * branch(branch_input).unsqueeze(-2)
    return branch_input, out


def official_connection(
    variant: str, state: Mapping[str, Tensor], streams: Tensor, branch: Callable[[Tensor], Tensor]
) -> Tensor:
    """The new streams [n, C] of one token, from the parameters of the authors' kromhc or mhc_lite module."""
    n = streams.shape[0]
    x = streams.reshape(-1)
    x = x / x.norm() * math.sqrt(x.numel()) * (1 + state["norm.gamma"])
    alpha, beta = x @ state["dynamic_alpha_fn"], x @ state["dynamic_beta_fn"]
    h_pre = torch.sigmoid(state["pre_branch_scale"] * alpha[:n] + state["static_alpha"][:n])
    h_post = 2 * torch.sigmoid(state["h_post_scale"] * beta + state["static_beta"])
    logits = state["residual_scale"] * alpha[n:] + state["static_alpha"][n:]
    matrix, start = torch.ones(1, 1, dtype=torch.float64), 0
    for size in [n] if variant == "mhc_lite" else prime_factors(n):
        count = math.factorial(size)
        matrix = torch.kron(matrix, birkhoff(logits[start : start + count], size))
        start += count
    branch_output = branch(sum(h_pre[s] * streams[s] for s in range(n)))
    # They consume the matrix transposed.
    out = [sum(matrix[s, t] * streams[s] for s in range(n)) + h_post[t] * branch_output for t in range(n)]
    return torch.stack(out)


def official_gpt(
    variant: str, state: Mapping[str, Tensor], ids: Tensor, num_heads: int, num_layers: int, num_streams: int
) -> Tensor:
    """Logits [S, vocabulary] of the authors' nanoGPT-style model without biases for one sequence of ids [S]."""
    hidden = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: len(ids)]
    size = hidden.shape[-1]

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, (size,), state[name])

    def attention(x: Tensor, block: str) -> Tensor:
        x = norm(x, block + "branch_attn.0.weight")
        query, key, value = (x @ state[block + "branch_attn.1.c_attn.weight"].T).split(size, dim=-1)
        heads = []
        for q, k, v in zip(*(part.chunk(num_heads, dim=-1) for part in (query, key, value)), strict=True):
            scores = q @ k.T / math.sqrt(q.shape[-1])
            hidden_future = torch.ones_like(scores).triu(1).bool()
            heads.append(torch.softmax(scores.masked_fill(hidden_future, -math.inf), dim=-1) @ v)
        return torch.cat(heads, dim=-1) @ state[block + "branch_attn.1.c_proj.weight"].T

    def feed_forward(x: Tensor, block: str) -> Tensor:
        x = norm(x, block + "branch_mlp.0.weight") @ state[block + "branch_mlp.1.c_fc.weight"].T
        return torch.nn.functional.gelu(x) @ state[block + "branch_mlp.1.c_proj.weight"].T

    streams = torch.stack([hidden] * num_streams, dim=1)  # [S, n, C]
    for layer in range(num_layers):
        block = f"transformer.h.{layer}."
        for name, branch in (("hc_attn.", attention), ("hc_mlp.", feed_forward)):
            prefix = block + name
            module = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
            inputs = []

            def record(x: Tensor, inputs: list[Tensor] = inputs) -> Tensor:
                inputs.append(x)
                return x

            for token in streams:
                official_connection(variant, module, token, record)
            outputs = iter(branch(torch.stack(inputs), block))
            streams = torch.stack(
                [official_connection(variant, module, token, lambda _, o=outputs: next(o)) for token in streams]
            )
    return norm(streams, "transformer.ln_f.weight").sum(1) @ state["transformer.wte.weight"].T
