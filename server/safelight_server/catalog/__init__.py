"""Pipelines that the server offers: manifests, model repository, tokenizer and pixel formats."""
