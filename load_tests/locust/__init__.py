"""Users for Locust: they request pictures as people do, and measure what people notice.

`locustfile.py` is what Locust runs; it needs `.venv-locust`. `prompts.py` chooses prompts, and `recognition.py` finds
the preview from which a picture can be recognised. docs/load-testing.md explains their use and their results.
"""
