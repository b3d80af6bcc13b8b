"""The tokens on which checkpoints are compared and looked at, where the user gives no text."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer


SAMPLE_TEXT = """Once upon a time there was a lighthouse keeper who read to the ships. Every evening, when the lamp was
lit, he took a book from the shelf, opened the window, and read one chapter aloud into the wind. The sailors could not
hear him, of course. The sea was much too loud for that. But they knew the hour, and they knew the light, and some of
them had brought him a book the year before. "What is it tonight?" asked the cook of a small grey ship. The captain
looked up at the lamp through the rain. "Something with a happy end," he said. "See how steady it burns." And they all
went below, and had soup, and slept until the morning."""


def sample_tokens(
    checkpoint: str | os.PathLike[str], text: str | None, length: int, vocab_size: int
) -> tuple[Tensor, Any]:
    """The first tokens of the text and the tokenizer; random tokens and None where no tokenizer can read the sample.

    Raises:
        ValueError: if there is a text and it is empty, or no tokenizer can read it.
    """
    if text is not None and not text.strip():
        raise ValueError("text must have at least one token; got an empty one. Leave it out to use a short story.")
    random = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        tokens = tokenizer(text or SAMPLE_TEXT, return_tensors="pt", truncation=True, max_length=length)["input_ids"]
    except Exception as error:  # the tokenizers library raises bare exceptions
        if text is None:
            return random, None
        raise ValueError(
            f"text needs a tokenizer that can read it; the one of {checkpoint} cannot ({error}). Leave text out."
        ) from error
    # A tokenizer of another alphabet turns the sample into a row of unknowns.
    return (tokens, tokenizer) if text or len(set(tokens[0].tolist())) > 1 else (random, None)
