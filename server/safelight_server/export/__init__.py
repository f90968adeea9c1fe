"""Exports a pipeline of diffusers as ONNX components with a manifest (extra `export`: torch, diffusers, transformers).

Beside `safelight export` the `torch` runtime imports these modules, and nothing else in the server.
"""
