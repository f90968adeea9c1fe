"""Trains, exports and evaluates the shipped model. The server imports nothing from this package."""

import os

# Before any module here imports onnxruntime or huggingface_hub, which otherwise report their use to their makers.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
