"""Turns prompts into token ids with the library `tokenizers`, as transformers' CLIPTokenizer does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tokenizers


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt, as the text encoder takes it.

    Attributes:
        ids: (T,) begin token, text, end token, padding.
        num_tokens: tokens of the whole text with begin and end, before it was cut.
        truncated: whether the text was cut.
    """

    ids: tuple[int, ...]
    num_tokens: int
    truncated: bool


class Tokenizer:
    """Reads a tokenizer file and encodes prompts to a fixed context length."""

    def __init__(self, file: Path, max_tokens: int, pad_id: int, bos_id: int, eos_id: int) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_tokens = max_tokens
        self._pad_id, self._bos_id, self._eos_id = pad_id, bos_id, eos_id

    def encode(self, text: str) -> Tokens:
        """Token ids of `text`, cut and padded to `max_tokens`, begin and end token included."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        room = self.max_tokens - 2
        kept = [self._bos_id, *ids[:room], self._eos_id]
        padding = [self._pad_id] * (self.max_tokens - len(kept))
        return Tokens((*kept, *padding), len(ids) + 2, len(ids) > room)


class TokenizerPair:
    """The tokenizers of a pipeline with two text encoders: the ids of the second follow those of the first."""

    def __init__(self, first: Tokenizer, second: Tokenizer) -> None:
        self._first, self._second = first, second
        self.max_tokens = first.max_tokens

    def encode(self, text: str) -> Tokens:
        """Token ids of `text`, (2 T,); the tokens are counted by the tokenizer that makes more of them."""
        first, second = self._first.encode(text), self._second.encode(text)
        num_tokens = max(first.num_tokens, second.num_tokens)
        return Tokens(first.ids + second.ids, num_tokens, first.truncated or second.truncated)
