"""Scenarios for ghz (`*.json`, each a configuration of ghz) and `run.py`, which runs them and prints one table.

`slow_reader.py` slows the connections of the scenario `slow-readers`, as ghz itself always reads at once.
docs/load-testing.md explains their use and their results.
"""
