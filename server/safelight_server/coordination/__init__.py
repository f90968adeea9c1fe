"""Leases, event streams and commits that replicas share.

base.py         the interface: leases with fencing tokens, streams of events, commits
leadership.py   a lease that is renewed while its work runs, and its commit
redis.py        the implementation on Redis; scripts/ has what runs inside it
"""
