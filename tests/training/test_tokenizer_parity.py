"""The server's tokenizer against transformers' CLIPTokenizer, on the shipped file and on hard texts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from safelight_server.catalog.tokenizer import Tokenizer
from transformers import CLIPTokenizer

from training import networks
from training.icons import caption, sample_spec
from training.recipe import RECIPE

HARD = ["", " ", "A RED Potion!!", "naïve café, über-größe", "龍の剣 🗡️✨", "it's  a\t\nsword; 3.5% (gold)", "red potion " * 60,
        "e\u0301 vs \u00e9", "don't, we'll, I'd", "<|endoftext|> sword", "x" * 400]  # fmt: skip


def captions(count: int) -> list[str]:
    rng = random.Random(5)
    return [caption(sample_spec(rng), rng) for _ in range(count)]


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[CLIPTokenizer, Tokenizer]:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    theirs = networks.tokenizer(RECIPE, captions(300))
    file = folder / "tokenizer.json"
    theirs.backend_tokenizer.save(str(file))
    ids = (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id)
    return theirs, Tokenizer(file, theirs.model_max_length, *ids)


@pytest.mark.parametrize("text", [*HARD, *captions(30)])
def test_ids_are_those_of_transformers(both, text):
    theirs, ours = both
    want = theirs(text, padding="max_length", truncation=True, max_length=ours.max_tokens).input_ids
    tokens = ours.encode(text)
    assert list(tokens.ids) == want
    full = theirs(text).input_ids
    assert (tokens.num_tokens, tokens.truncated) == (len(full), len(full) > ours.max_tokens)
