"""Vectors for the index benchmark: real prompts of `icons` through its encoder, and clustered random ones.

Both are functions of a seed. The real ones take minutes (0.4 ms of one core for
each caption) and are kept in out/index for `load_tests.calibration.index`.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safelight_server.cache.approximate.embedding import centred, prompt_vector
from safelight_server.cache.approximate.guard import Guard
from safelight_server.catalog.catalog import load
from safelight_server.catalog.pipeline import Pipeline
from safelight_server.domain.component import Component
from safelight_server.runtime.onnx import _session as onnx_session

from training.icons import caption, sample_spec

Floats = npt.NDArray[np.float32]
MODELS = Path(__file__).parent.parent.parent / "models"
OUT = Path("out/index")
"""Folder in which real vectors are saved."""
BATCH = 64
MAX_QUERIES = 2000
CLUSTER = 64
"""Mean number of vectors around one centre."""


@dataclass(frozen=True)
class Vectors:
    """Attributes:
    stored: (N, D) float16, unit vectors.
    queries: (Q, D) float32, unit vectors, not among the stored.
    facts: (N,) and facts_of_queries (Q,): equal where the text guard lets one answer for the other; None: no texts.
    """

    name: str
    stored: npt.NDArray[np.float16]
    queries: Floats
    facts: npt.NDArray[np.int64] | None = None
    facts_of_queries: npt.NDArray[np.int64] | None = None


def captions(count: int, seed: int) -> list[str]:
    """Returns `count` distinct captions in the order in which they were drawn."""
    rng = random.Random(f"index/{seed}")
    found: dict[str, None] = {}
    while len(found) < count:
        found[caption(sample_spec(rng), rng, full=rng.random() < 0.5)] = None
    return list(found)


class Encoder:
    """Turns prompts into centred vectors, as the server does."""

    def __init__(self, pipeline: Pipeline | None = None) -> None:
        self.pipeline = pipeline or load(MODELS).get("icons")
        self._session = onnx_session(self.pipeline.files[Component.TEXT_ENCODER])
        self.mean = self.raw(self.pipeline.manifest.example_prompts).mean(axis=0)

    def raw(self, prompts: list[str] | tuple[str, ...]) -> Floats:
        """Returns prompt vectors (N, D) float32, not centred."""
        assert self.pipeline.tokenizer is not None
        eos = self.pipeline.manifest.tokenizer.eos_id
        vectors = []
        for start in range(0, len(prompts), BATCH):
            ids = [self.pipeline.tokenizer.encode(prompt).ids for prompt in prompts[start : start + BATCH]]
            hidden = self._session.run(["last_hidden_state"], {"input_ids": np.array(ids, np.int64)})[0]
            vectors += [prompt_vector(h, i, eos) for h, i in zip(hidden, ids, strict=True)]
        return np.stack(vectors)

    def __call__(self, prompts: list[str] | tuple[str, ...]) -> Floats:
        return centred(self.raw(prompts), self.mean)


def real(count: int, num_queries: int) -> Vectors:
    """Returns vectors of distinct captions by the encoder of `icons`; the queries, at most 2000, are captions too."""
    encoder = Encoder()
    manifest = encoder.pipeline.manifest
    key = hashlib.sha256(f"{encoder.pipeline.digest} {manifest.example_prompts} {manifest.guard}".encode()).hexdigest()
    file = OUT / f"real-{count}-{MAX_QUERIES}-{key[:12]}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        texts, guard = captions(count + MAX_QUERIES, seed=1), Guard(manifest.guard)
        random.Random(0).shuffle(texts)
        facts = np.array([_hash(repr(guard.facts(text))) for text in texts])
        vectors = np.concatenate([encoder(texts[i : i + 4096]).astype(np.float16) for i in range(0, len(texts), 4096)])
        np.savez(file, vectors=vectors, facts=facts)
    with np.load(file) as arrays:
        vectors, facts = arrays["vectors"], arrays["facts"]
    queries = vectors[count : count + num_queries].astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    return Vectors("captions of icons", vectors[:count], queries, facts[:count], facts[count : count + num_queries])


def clustered(count: int, num_queries: int, dimension: int = 768) -> Vectors:
    """Returns random vectors at cosine 0.8 to 0.99 to their centres; queries at 0.95 to 0.999 to a stored vector."""
    rng = np.random.default_rng(1)
    centres = _unit(rng.standard_normal((max(1, count // CLUSTER), dimension), np.float32))
    stored = np.empty((count, dimension), np.float16)
    for start in range(0, count, 20_000):
        part = centres[rng.integers(0, len(centres), min(20_000, count - start))]
        stored[start : start + len(part)] = _near(part, rng.uniform(0.8, 0.99, len(part)), rng)
    chosen = stored[rng.integers(0, count, num_queries)].astype(np.float32)
    return Vectors(
        "clustered, 768 dimensions", stored, _near(_unit(chosen), rng.uniform(0.95, 0.999, num_queries), rng)
    )


def _near(vectors: Floats, cosines: npt.NDArray[np.float64], rng: np.random.Generator) -> Floats:
    """Returns random unit vectors at exactly these cosines to the given ones."""
    other = rng.standard_normal(vectors.shape, np.float32)
    other = _unit(other - (other * vectors).sum(axis=1, keepdims=True) * vectors)
    c = cosines[:, None].astype(np.float32)
    return np.asarray(c * vectors + np.sqrt(1 - c**2) * other, np.float32)


def _unit(vectors: Floats) -> Floats:
    unit: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
