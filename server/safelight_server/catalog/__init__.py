"""The pipelines that are served and the files they are made of."""
