"""The image or sound on which checkpoints of several modalities are compared: through their processor, or random."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoProcessor


# How a report calls what was looked at.
PROCESSED, RANDOM = "an image through the processor", "a random image or sound"
TEXT_ALONE = "no image or sound"
# Names in a configuration of the token that stands for a piece of it.
PLACE_NAMES = ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index", "video_token_index")
SIZE = 96


class Example(NamedTuple):
    """Tokens with places for an image or sound, and that.

    Args:
        inputs: of the model: `input_ids` `[1, S]` and the others.
        kind: PROCESSED, RANDOM, or TEXT_ALONE where neither could be made; None for a model that takes text alone.
    """

    inputs: dict[str, Tensor]
    kind: str | None


def image_example(
    model: Any, folder: Path, tokens: Tensor, text: str, run: Callable[..., Any] | None = None
) -> Example | None:
    """An image, or sound, and text for a model of several modalities; None for others.

    Args:
        model: the base, which is run to see what it takes.
        folder: of its checkpoint; its processor makes the inputs, if it has one.
        tokens: `[1, S]`, of the text.
        text: to go with the image.
        run: how to run it, by default by calling it.

    Raises:
        ValueError: if the model takes no text alone and nothing else that can be made, from what it said last.
    """
    if model.config.get_text_config() is model.config:
        return None
    alone = Example({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, TEXT_ALONE)
    examples = (*_processed(folder, text, tokens.shape[1]), *_random(model, tokens), alone)
    for example in examples:
        try:
            (run or model)(**example.inputs)
        except Exception as error:  # whatever a family makes of inputs that are not its own
            last = error
            continue
        return example
    raise ValueError(
        f"{type(model).__name__} must be run on text or on an image or sound that could be made, and {folder} has no "
        f"processor that makes what it takes, or it fails for another reason; on text alone it says: "
        f"{type(last).__name__}: {last}. Put the files of its processor there."
    ) from last


def draw_image(size: int = SIZE) -> Any:
    """A small picture: a disc on a gradient, `[size, size]` pixels in RGB."""
    from PIL import Image, ImageDraw

    image = Image.linear_gradient("L").resize((size, size)).convert("RGB")
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill=(220, 60, 40))
    return image


def _processed(folder: Path, text: str, length: int) -> Iterator[Example]:
    """What the processor of a checkpoint makes of an image and text, in the ways that processors know."""
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        image = draw_image()
        ids = processor.tokenizer(text, truncation=True, max_length=length)["input_ids"]
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
    except Exception:  # no processor, or a tokenizer or feature extractor alone
        return
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    for make in (
        lambda: processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        ),
        lambda: processor(text=getattr(processor, "image_token", "") + text, images=[image], return_tensors="pt"),
    ):
        try:
            made = {name: value for name, value in make().items() if isinstance(value, Tensor)}
        except Exception:  # processors raise what they like
            continue
        if any(value.is_floating_point() for value in made.values()):
            yield Example(made, PROCESSED)


def _random(model: Any, tokens: Tensor) -> Iterator[Example]:
    """Random images, then random sounds, in the forms that families take them, among the tokens."""
    place = next((getattr(model.config, name) for name in PLACE_NAMES if getattr(model.config, name, None)), None)
    if place is None:
        return
    for name, forms in (("get_image_features", _images(model.config)), ("get_audio_features", _sounds(model.config))):
        features = getattr(model, name, None)
        if features is None:
            continue
        known, taking = (inspect.signature(f).parameters for f in (features, type(model).forward))
        for whole in forms:
            form = {name: value for name, value in whole.items() if name in taking}
            passed_on = "args" in known or "kwargs" in known
            taken = form if passed_on else {name: value for name, value in form.items() if name in known}
            try:
                count = getattr(model.config, "num_query_tokens", None) or _count(features(**taken), model)
            except Exception:  # not in this form
                continue
            yield Example(_around(model, tokens, place, count) | form, RANDOM)


def _around(model: Any, tokens: Tensor, place: int, count: int) -> dict[str, Tensor]:
    """The tokens with `count` places among them."""
    tokens = torch.where(tokens == place, 0, tokens)
    ids = torch.cat([tokens[:, :1], torch.full((1, count), place), tokens[:, 1:]], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    known = inspect.signature(type(model).forward).parameters
    if "mm_token_type_ids" in known:
        inputs["mm_token_type_ids"] = (ids == place).int()
    if "qformer_input_ids" in known:
        inputs["qformer_input_ids"] = tokens
    return inputs


def _count(features: Any, model: Any) -> int:
    """How many tokens features take."""
    features = getattr(features, "pooler_output", features)
    parts = [features] if isinstance(features, Tensor) else features
    return sum(part.numel() for part in parts) // model.config.get_text_config().hidden_size


def _images(config: Any) -> Iterator[dict[str, Tensor]]:
    """Random images as families take them: whole, cut into tiles, or as patches of a grid."""
    vision = getattr(config, "vision_config", None)
    size, patch, channels = (_number(vision, *names) for names in (("image_size",), ("patch_size",), ("num_channels",)))
    size, patch, channels = size or SIZE, patch or 16, channels or 3
    merge = _number(vision, "spatial_merge_size", "merge_size") or 2
    whole = _noise(1, channels, size, size)
    sizes = {"image_sizes": torch.tensor([[size, size]])}
    yield {"pixel_values": whole} | sizes
    yield {"pixel_values": whole}
    yield {"pixel_values": whole[:, None]}
    yield {"pixel_values": _noise(1, 2, channels, size, size)} | sizes
    side = 2 * merge
    grid = {"image_grid_thw": torch.tensor([[1, side, side]])}
    for frames in dict.fromkeys((_number(vision, "temporal_patch_size") or 1, 1, 2)):
        yield {"pixel_values": _noise(side * side, frames * channels * patch * patch)} | grid
    yield {"pixel_values": _noise(side * side, channels, patch, patch)} | grid


def _sounds(config: Any) -> Iterator[dict[str, Tensor]]:
    """Random sounds as spectrograms, with a mask under the names that it has."""
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", None)
    bands = _number(audio, "num_mel_bins", "input_dim") or 80
    longest = 2 * (_number(audio, "max_source_positions") or 64)
    for shape in ((1, bands, longest), (1, bands, 100), (1, 64, bands)):
        mask = torch.ones(1, shape[2] if shape[1] == bands else shape[1], dtype=torch.long)
        yield {"input_features": _noise(*shape), "input_features_mask": mask, "feature_attention_mask": mask}
        yield {"input_features": _noise(*shape)}


def _number(config: Any, *names: str) -> int | None:
    found = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
    return found[0] if isinstance(found, list | tuple) else found


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
