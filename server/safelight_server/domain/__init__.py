"""The values that stages pass to each other, such as requests, events and errors. They do no I/O.

`caller.py` who sends a request; `request.py` what is requested; `events.py` what
happens to a generation; `errors.py` why a call fails; `picture.py` pixels and
their encodings; `component.py` the networks of a pipeline; `roles.py` and
`tensors.py` small types.
"""
