"""Who computes what, across replicas.

leadership.py   a lease kept alive while its work runs, and its commit
base.py         the interface: leases with fencing tokens, streams of events, commits
local.py        for one process
redis.py        for replicas that share a Redis; scripts/ has what runs inside it
"""
