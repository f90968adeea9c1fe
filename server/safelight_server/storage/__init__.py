"""Tiered, encrypted storage of cached bytes: memory, Redis, disk and object storage. And the table of the ledger.

tiers.py     all tiers as one store whose reads never fail: a broken tier is a miss
purge.py     deletes by tenant, model revision or generation
sealed.py    the stored format: AES-256-GCM with a short header in plain text
keyring.py   the operator's encryption keys, and HMACs for names
breaker.py   circuit breaker: a timeout on each call, and a pause after failures
clock.py     one Unix time for all replicas: that of their Redis
mover.py     writes to one tier in the background
memory.py · redis.py · disk.py · objects.py     the tiers, each a `Store`
dynamodb.py  a table in DynamoDB, which is no tier
base.py      the interface `Store` and its errors
"""
