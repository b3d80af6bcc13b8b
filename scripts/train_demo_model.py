"""Trains the tiny GPT-2 that `kromhc demo` and the examples run on, from text to checkpoint.

    python scripts/train_demo_model.py TRAIN.txt VALID.txt kromhc_hf/demo_data/gpt2-tinystories-1M

A byte-level BPE of 1024 tokens and a GPT-2 of 957 k parameters (4 layers, width 128, context 256) are trained on
stories separated by <|endoftext|>; the weights are saved in bf16.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from rich.progress import Progress
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


CONTEXT, BATCH, PEAK_LR, WARMUP = 256, 16, 4e-3, 100
SEPARATOR = "<|endoftext|>"


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.split(SEPARATOR), vocab_size=1024, special_tokens=[SEPARATOR], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    stories = tokenizer([story.strip() for story in text.split(SEPARATOR) if story.strip()])["input_ids"]
    return torch.tensor([token for story in stories for token in (tokenizer.bos_token_id, *story)])


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokens: torch.Tensor, windows: int = 200) -> float:
    model.eval()
    rows = tokens[: windows * CONTEXT].view(-1, CONTEXT).split(BATCH)
    losses = [model(row, labels=row).loss.item() * len(row) for row in rows]
    model.train()
    return sum(losses) / sum(len(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="training time")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    text = arguments.train.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    train, valid = encode(tokenizer, text), encode(tokenizer, arguments.valid.read_text(encoding="utf-8"))
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    budget, start, step = arguments.minutes * 60, time.monotonic(), 0
    with Progress() as progress:
        bar = progress.add_task("training", total=budget)
        while (elapsed := time.monotonic() - start) < budget:
            decay = 0.5 * (1 + math.cos(math.pi * elapsed / budget))
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * min((step + 1) / WARMUP, 1) * (0.02 + 0.98 * decay)
            rows = torch.randint(len(train) - CONTEXT, (BATCH,))
            batch = torch.stack([train[row : row + CONTEXT] for row in rows.tolist()])
            loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            progress.update(bar, completed=elapsed, description=f"step {step}, loss {loss.item():.3f}")
    model.bfloat16().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    loss = held_out_loss(GPT2LMHeadModel.from_pretrained(arguments.output), valid)
    print(f"{step} steps, held-out loss {loss:.3f} nats per token; saved to {arguments.output}")


if __name__ == "__main__":
    main()
