"""A processor of images and text for the tiny llava, with a vocabulary of a few words."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from kromhc_hf.conversion.sample_text import SAMPLE_TEXT

from .composite import PLACE


IMAGE_TOKEN = "<image>"


def tiny_processor() -> LlavaProcessor:
    """Takes the words of the sample text that come first, and pictures of any size."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(SAMPLE_TEXT.lower().split())][:PLACE]
    vocabulary = {word: position for position, word in enumerate(words)} | {IMAGE_TOKEN: PLACE}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN],
    )
    size = {"height": 28, "width": 28}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        fast,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
    )
