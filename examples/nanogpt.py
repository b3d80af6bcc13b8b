"""Hyper-connections in a hand-written GPT: `HyperConnection` alone, with no model of transformers.

    python examples/nanogpt.py --init paper

The model reads bytes. `expand` makes the streams behind the embeddings, each residual branch has a `HyperConnection`,
and `mean_of_streams` joins them in front of the final norm. Init "paper" is for training anew, as here; with "identity"
the model starts as the one without streams, also with weights that were trained before.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scaffold import TEXT, report
from torch import Tensor, nn

from kromhc_hf import HyperConnection, expand, mean_of_streams, optimizer_param_groups


class Size(NamedTuple):
    vocabulary: int = 256
    context: int = 64
    width: int = 64
    heads: int = 4
    layers: int = 3
    streams: int = 4
    init: str = "paper"


class Attention(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.heads = size.heads
        self.c_attn, self.c_proj = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, size: Size, layer: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attn, self.mlp = Attention(size), FeedForward(size)
        # One for every residual branch, counted through the whole model.
        self.attn_hc = HyperConnection(size.width, size.streams, branch_index=2 * layer, init=size.init)
        self.ffn_hc = HyperConnection(size.width, size.streams, branch_index=2 * layer + 1, init=size.init)

    def forward(self, streams: Tensor) -> Tensor:  # [B, S, n, C]
        x, write = self.attn_hc(streams)  # in place of x = x + attn(ln_1(x))
        streams = write(self.attn(self.ln_1(x)))
        x, write = self.ffn_hc(streams)
        return write(self.mlp(self.ln_2(x)))


class NanoGPT(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.wte, self.wpe = nn.Embedding(size.vocabulary, size.width), nn.Embedding(size.context, size.width)
        self.h = nn.ModuleList(Block(size, layer) for layer in range(size.layers))
        self.ln_f = nn.LayerNorm(size.width)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, S] -> [B, S, V]
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        streams = expand(x, self.size.streams)
        for block in self.h:
            streams = block(streams)
        return self.ln_f(mean_of_streams(streams)) @ self.wte.weight.T


def loss_on(model: NanoGPT, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=str(TEXT), help="text file to train on")
    parser.add_argument("--output", default="example-output/nanogpt", help="folder for the result")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--length", type=int, default=64, help="bytes per sequence")
    parser.add_argument("--init", default="paper", choices=("paper", "identity"), help="of the hyper-connections")
    options = parser.parse_args()

    torch.manual_seed(0)
    data = torch.frombuffer(bytearray(Path(options.text).read_bytes()), dtype=torch.uint8).long()
    windows = data[: len(data) // (options.length + 1) * (options.length + 1)].view(-1, options.length + 1)
    border = len(windows) * 9 // 10
    training, held_out = windows[:border], windows[border:][:64]
    model = NanoGPT(Size(context=options.length, init=options.init))
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, lr=1e-3, hyper_connection_lr=1e-2, weight_decay=0.1))
    with torch.no_grad():
        before = loss_on(model, held_out).item()
    for _ in range(options.steps):
        loss = loss_on(model, training[torch.randint(len(training), (options.batch,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = loss_on(model, held_out).item()
    Path(options.output).mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), Path(options.output) / "nanogpt.pt")
    report(before, after, options.output)


if __name__ == "__main__":
    main()
