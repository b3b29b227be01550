"""A CLIP tokenizer of the world's words, and the text encoder's sizes that follow from it."""

from collections import Counter
from itertools import pairwise

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from fastgrpo.shapes.world import all_captions

MAX_TOKENS = 12
TEXT_WIDTH = 64
_END = "</w>"


def train_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary has every word of the world as one token."""
    merges = _merges({word for caption in all_captions() for word in str(caption).split()})
    alphabet = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    # CLIP's order: characters, characters that end a word, merges, and last the two special tokens: its text model
    # takes the largest id as the end of the text
    words = [*alphabet, *(c + _END for c in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    assert max(len(tokenizer(str(c)).input_ids) for c in all_captions()) <= MAX_TOKENS
    return tokenizer


def _merges(words: set[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one piece, the most frequent pair first, ties in alphabetical order.

    The tokenizers library breaks ties by a hash that differs from process to process.
    """
    pieces = {word: [*word[:-1], word[-1] + _END] for word in words}
    merges = []
    while counts := Counter(pair for parts in pieces.values() for pair in pairwise(parts)):
        first, second = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((first, second))
        for parts in pieces.values():
            for i in range(len(parts) - 2, -1, -1):
                if (parts[i], parts[i + 1]) == (first, second):
                    parts[i : i + 2] = [first + second]
    return merges


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids [B, L], padded."""
    return tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Of the pipeline's two text encoders, and of the scorer's."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
