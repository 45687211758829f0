"""Tokenizers of a few letters, so that no vocabulary has to be fetched."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    Qwen2Tokenizer,
    RobertaTokenizer,
    T5TokenizerFast,
    XLMRobertaTokenizer,
)

LETTERS = [chr(code) for code in range(33, 127)]
QWEN_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def clip(length: int = 77) -> CLIPTokenizer:
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = _numbered([*LETTERS, *(letter + "</w>" for letter in LETTERS), *ends])
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length, pad_token=ends[1], unk_token=ends[1])


def t5(length: int = 77) -> T5TokenizerFast:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5TokenizerFast(vocab=[(piece, -2.0) for piece in pieces], extra_ids=0, model_max_length=length)


def xlm_roberta() -> XLMRobertaTokenizer:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "▁", *LETTERS, "<mask>"]
    return XLMRobertaTokenizer(vocab=[(piece, -2.0) for piece in pieces], model_max_length=77)


def gemma(length: int = 256) -> GemmaTokenizer:
    return GemmaTokenizer(
        vocab=_numbered(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]),
        merges=[],
        model_max_length=length,
        padding_side="right",
    )


def bert() -> BertTokenizer:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
    return BertTokenizer(vocab=_numbered(pieces), model_max_length=77)


def roberta() -> RobertaTokenizer:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "<mask>"]
    return RobertaTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=77)


def glm_image() -> Qwen2Tokenizer:
    """With the marks that GLM-Image puts around the sizes of images."""
    tokenizer = Qwen2Tokenizer(
        vocab=_numbered([*sorted(ByteLevel.alphabet()), QWEN_TOKENS[0]]),
        merges=[],
        model_max_length=1024,
        bos_token="<|begin|>",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen() -> Qwen2Tokenizer:
    """With the marks of Qwen's chats; `qwen_token` says which number one has."""
    tokenizer = Qwen2Tokenizer(
        vocab=_numbered([*sorted(ByteLevel.alphabet()), QWEN_TOKENS[0]]), merges=[], model_max_length=1024
    )
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_TOKENS[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer
