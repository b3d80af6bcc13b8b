"""Fine-tunes a vision-language model with hyper-connections in its text model, on pictures that the script draws.

With the Trainer of transformers, or TRL's SFTTrainer (--trainer sft). By default the model is a tiny llava with random
weights; --model takes any checkpoint of AutoModelForImageTextToText, with its processor.

python examples/images.py [--model ID] [--trainer sft] [--output FOLDER]
"""

import random
from itertools import product
from typing import Any

import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from scaffold import MODEL, parse_arguments, report, training_options
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from kromhc_hf import HyperConnectionTrainerMixin, apply_hyper_connections


SIZE, PATCH = 32, 8
COLORS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("disc", "square", "bar")
TEMPLATE = """\
{% for message in messages %}{% for part in message.content %}\
{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}
{% endfor %}"""


class ImageTrainer(HyperConnectionTrainerMixin, Trainer):
    """A learning rate of their own for the hyper-connections."""


class ImageSFTTrainer(HyperConnectionTrainerMixin, SFTTrainer):
    """Likewise."""


def draw(color: str, shape: str, rng: random.Random) -> Image.Image:
    """A shape of one color, anywhere on a grey ground."""
    image = Image.new("RGB", (SIZE, SIZE), "grey")
    left, top = rng.randrange(SIZE // 2), rng.randrange(SIZE // 2)
    box = (left, top, left + SIZE // 2, top + (SIZE // 8 if shape == "bar" else SIZE // 2))
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "disc" else pen.rectangle)(box, fill=color)
    return image


def pairs(seed: int) -> Dataset:
    """Every shape in every color, each with a question and the answer."""
    rng = random.Random(seed)
    rows = [
        {
            "images": [draw(color, shape, rng)],
            "prompt": [{"role": "user", "content": "What is in the picture?"}],
            "completion": [{"role": "assistant", "content": f"A {color} {shape}."}],
        }
        for color, shape in product(COLORS, SHAPES)
    ]
    return Dataset.from_list(rows)


def tiny_llava() -> tuple[Any, Any]:
    """A llava of a few layers with random weights, and its processor with the tokenizer of the embedded model."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, additional_special_tokens=["<image>"], pad_token="<pad>")
    size = {"height": SIZE, "width": SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        text_config=LlamaConfig(**layers, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        vision_config=CLIPVisionConfig(**layers, image_size=SIZE, patch_size=PATCH),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config), processor


def main() -> None:
    options = parse_arguments(__doc__ or "", steps=60, learning_rate=1e-3, trainers=("trainer", "sft"))
    if options.model == str(MODEL):
        model, processor = tiny_llava()
    else:
        model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(options.model)
    apply_hyper_connections(model, num_streams=options.num_streams)
    # Pictures become pixels batch by batch.
    settings = {**training_options(options), "remove_unused_columns": False}
    data = {"train_dataset": pairs(seed=0), "eval_dataset": pairs(seed=1)}
    trainer: Any
    if options.trainer == "sft":
        arguments = SFTConfig(**settings, max_length=None, completion_only_loss=True)
        trainer = ImageSFTTrainer(model=model, args=arguments, processing_class=processor, **data)
    else:
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
        trainer = ImageTrainer(model=model, args=TrainingArguments(**settings), data_collator=collator, **data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    report(before, trainer.evaluate()["eval_loss"], options.output)


if __name__ == "__main__":
    main()
