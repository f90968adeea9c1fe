"""Turns prompts into token ids with the library `tokenizers`, as those of transformers do (CLIP's, T5's, Qwen's)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tokenizers


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized prompt, as the text encoder takes it.

    Attributes:
        ids: (T,) begin token where there is one, text, end token, padding.
        num_tokens: tokens of the whole text with those, before it was cut.
        truncated: whether the text was cut.
    """

    ids: tuple[int, ...]
    num_tokens: int
    truncated: bool


class Tokenizer:
    """Reads a tokenizer file and encodes prompts to a fixed context length.

    Args:
        bos_id: the begin token; None: there is none.
        around: the text before and the text after each prompt, in place of a begin and an end token. It is cut with
            the prompt, as the chat template of transformers is.
    """

    def __init__(
        self,
        file: Path,
        max_tokens: int,
        pad_id: int,
        bos_id: int | None,
        eos_id: int,
        around: tuple[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_tokens = max_tokens
        self._pad_id, self._eos_id = pad_id, eos_id
        self._begin = () if bos_id is None else (bos_id,)
        self._around = around

    def encode(self, text: str) -> Tokens:
        """Token ids of `text`, cut and padded to `max_tokens`, special tokens included."""
        if self._around is not None:
            before, after = self._around
            ids = self._ids(before + text + after)
            return self._padded(ids[: self.max_tokens], len(ids))
        ids, num_special = self._ids(text), len(self._begin) + 1
        kept = [*self._begin, *ids[: self.max_tokens - num_special], self._eos_id]
        return self._padded(kept, len(ids) + num_special)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _padded(self, kept: list[int], num_tokens: int) -> Tokens:
        padding = [self._pad_id] * (self.max_tokens - len(kept))
        return Tokens((*kept, *padding), num_tokens, num_tokens > self.max_tokens)


class TokenizerGroup:
    """The tokenizers of a pipeline with several text encoders: the ids of each stand behind those of the one before.

    Attributes:
        max_tokens: of the longest context: a token is read as long as it is within one of them.
    """

    def __init__(self, *tokenizers: Tokenizer) -> None:
        self._tokenizers = tokenizers
        self.max_tokens = max(at.max_tokens for at in tokenizers)

    def encode(self, text: str) -> Tokens:
        """Token ids of `text`; the tokens are counted by the one with the longest context that makes most of them."""
        made = [at.encode(text) for at in self._tokenizers]
        longest = [one for one in made if len(one.ids) == self.max_tokens]
        ids = tuple(token for one in made for token in one.ids)
        return Tokens(ids, max(one.num_tokens for one in longest), any(one.truncated for one in longest))
