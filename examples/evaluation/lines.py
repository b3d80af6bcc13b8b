"""What lm-eval is shown of the text."""

from datasets import Dataset


def not_empty(lines: Dataset) -> Dataset:
    return lines.filter(lambda line: line["text"].strip() != "")
