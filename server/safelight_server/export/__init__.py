"""Exports a pipeline of diffusers as ONNX components with a manifest (extra `export`: torch, diffusers, transformers).

Nothing else in the server imports these modules before `safelight export` runs.
"""
