"""What manifests of small pipelines say of image prompts."""

from __future__ import annotations

from safelight_server.catalog.manifest import IMAGE_PROMPT_INPUTS, STABLE_DIFFUSION_INPUTS

ROOM = {"edge_px": 8, "num_tokens": 2, "width": 3}
INPUTS = STABLE_DIFFUSION_INPUTS | IMAGE_PROMPT_INPUTS
IMAGE_ENCODER = {"image_encoder": {"model": "small_image_encoder", "version": 1, "sha256": "0" * 64}}
