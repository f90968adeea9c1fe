"""How well a picture agrees with its prompt, by a CLIP: the cosine of both embeddings.

Hessel et al., "CLIPScore", EMNLP 2021.

A judge is a folder, which `safelight export-judge` writes from a CLIP of transformers; anything that
writes the same files can be one:

- `judge.json`: `JudgeConfig`.
- `tokenizer.json`: of the library `tokenizers`.
- `text/model.onnx`: input_ids (B, max_tokens) int64 → text_embeds (B, D) float32.
- `image/model.onnx`: pixel_values (B, 3, image_px, image_px) float32, normalised → image_embeds (B, D) float32.

The judge computes with one thread and is called in the threads that encode pictures.
Import this module only where there is a judge: importing onnxruntime takes time.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import numpy.typing as npt
import onnxruntime
import tokenizers
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safelight_server.domain.picture import clip_centre
from safelight_server.quality.measures import FloatPixels, Pixels

CONFIG_FILE, TOKENIZER_FILE = "judge.json", "tokenizer.json"
TEXT_FILE, IMAGE_FILE = "text/model.onnx", "image/model.onnx"
MAX_PROMPTS = 256
"""Embeddings of so many prompts are kept: the outputs of a request share theirs."""


class JudgeError(Exception):
    """A folder is no judge; the message says why, and names it."""


class JudgeConfig(BaseModel):
    """`judge.json`: how prompts and pictures are prepared.

    Attributes:
        format: 1.
        name: for the log.
        max_tokens: length of input_ids, begin and end included; longer prompts are cut.
        bos_id, eos_id: begin and end.
        pad_id: fills shorter prompts.
        image_px: edge of pixel_values. The shorter edge of a picture is scaled to it (bicubic), and its centre is used.
        mean, std: of red, green and blue from 0 to 1: what pixel_values are normalised by.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = Field(ge=1, le=1)
    name: str
    max_tokens: int = Field(ge=3, le=4096)
    bos_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    pad_id: int = Field(ge=0)
    image_px: int = Field(ge=1, le=2048)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class PromptJudge:
    """Measures prompt agreement. May be called by several threads.

    Raises:
        JudgeError: the folder is no judge.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.config = JudgeConfig.model_validate_json((folder / CONFIG_FILE).read_bytes())
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except (OSError, ValidationError) as error:
            raise JudgeError(f"{folder}: {error}") from None
        except Exception as error:  # noqa: BLE001  # tokenizers raises plain Exceptions
            raise JudgeError(f"{folder / TOKENIZER_FILE}: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._text = _session(folder / TEXT_FILE, "input_ids", "text_embeds")
        self._image = _session(folder / IMAGE_FILE, "pixel_values", "image_embeds")
        self._lock = threading.Lock()  # guards the dict below
        self._prompts: OrderedDict[str, npt.NDArray[np.float32]] = OrderedDict()
        grey = np.full((8, 8, 3), 127, np.uint8)
        try:
            self.agreement("a picture", grey)
        except Exception as error:  # noqa: BLE001  # of any kind, where networks and configuration do not fit
            raise JudgeError(f"{folder}: a trial failed: {error}") from None

    def agreement(self, prompt: str, pixels: Pixels) -> float:
        """The cosine, from -1 to 1, of the embeddings of a prompt and of a picture (H, W, 3)."""
        [found] = self._image.run(["image_embeds"], {"pixel_values": self._prepared(pixels)[None]})
        return float(self._embedding(prompt) @ _unit(found[0]))

    def _embedding(self, prompt: str) -> npt.NDArray[np.float32]:
        with self._lock:
            if prompt in self._prompts:
                self._prompts.move_to_end(prompt)
                return self._prompts[prompt]
        config = self.config
        words = self._tokenizer.encode(prompt, add_special_tokens=False).ids[: config.max_tokens - 2]
        ids = np.full((1, config.max_tokens), config.pad_id, np.int64)
        ids[0, : len(words) + 2] = [config.bos_id, *words, config.eos_id]
        [found] = self._text.run(["text_embeds"], {"input_ids": ids})
        unit = _unit(found[0])
        with self._lock:
            self._prompts[prompt] = unit
            if len(self._prompts) > MAX_PROMPTS:
                self._prompts.popitem(last=False)
        return unit

    def _prepared(self, pixels: Pixels) -> FloatPixels:
        """A picture as CLIPImageProcessor of transformers prepares it: (3, image_px, image_px)."""
        centre = np.asarray(clip_centre(Image.fromarray(pixels), self.config.image_px)).astype(np.float32) / 255
        mean, std = (np.array(values, np.float32) for values in (self.config.mean, self.config.std))
        return np.ascontiguousarray(((centre - mean) / std).transpose(2, 0, 1))


def _session(file: Path, takes: str, gives: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # the cores belong to the runtime
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  # ONNX Runtime has many kinds
        raise JudgeError(f"{file}: {error}") from None
    has = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
    if has[0] != [takes] or gives not in has[1]:
        raise JudgeError(f"{file}: must take {takes} and give {gives}; it takes {has[0]} and gives {has[1]}")
    return session


def _unit(embedding: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return embedding / max(float(np.linalg.norm(embedding)), 1e-12)
