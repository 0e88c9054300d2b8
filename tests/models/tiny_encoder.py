"""A tiny encoder with its tokenizer, built in code from a fixed seed."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "plot", "the", "a", "very", "was")
TINY_BERT = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=32,
)


def tiny_bert() -> BertModel:
    """Build the same 4-layer, 32-dimensional encoder every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return BertModel(BertConfig.from_dict(TINY_BERT.to_dict()), add_pooling_layer=False)


def tiny_tokenizer() -> Tokenizer:
    """Build a word tokenizer over WORDS that adds [CLS] and [SEP]."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def save_encoder_and_texts(folder: Path) -> Path:
    """Write the encoder with its tokenizer, and 80 texts of two classes, texts.jsonl; returns its directory."""
    encoder = folder / "encoder"
    tiny_bert().save_pretrained(encoder)
    tiny_tokenizer().save(str(encoder / "tokenizer.json"))
    lines = [
        json.dumps({"text": f"{word} film {'very ' * (n % 7)}{n}", "label": word})
        for n in range(40)
        for word in ("good", "bad")
    ]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return encoder
