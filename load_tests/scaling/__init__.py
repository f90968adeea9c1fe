"""Simulates scaling policies of a fleet on traces of demand: `make bench ONLY=scaling`.

traces.py     demand over weeks: generated, or from a file
fleet.py      a queue, replicas that take time to start, and what a policy costs and misses
policies.py   scaling by CPU, by the queue alone, by `safelight scaler`, and with perfect foresight
"""
