"""Generations from the request to the last event: planned, developed, suspended, resumed, finished."""
