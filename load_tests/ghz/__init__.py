"""Scenarios of ghz (`*.json`, each a configuration of ghz) and `run.py`, which runs them and prints one table.

`slow_reader.py` slows the connections of the scenario `slow-readers`, as ghz itself always reads at once.
docs/load-testing.md says how to use and to read them.
"""
