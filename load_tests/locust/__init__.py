"""Users of locust: they ask for pictures as people do, and measure what people notice.

`locustfile.py` is what locust runs; it needs `.venv-locust`. `prompts.py` chooses what is asked for, `recognition.py`
says from which preview on a picture can be recognised. docs/load-testing.md says how to use and to read them.
"""
