"""Where cached bytes lie, from the request down.

tiers.py     memory, Redis, disk, objects behind one face that never fails
purge.py     deletes by tenant, model revision or generation
sealed.py    bytes as they are stored: encrypted, checked, with a short header in the clear
keyring.py   the operator's keys
breaker.py   bounds what a failing tier costs
memory.py · redis.py · disk.py · objects.py     the tiers, each a `Store`
base.py      the interface of a tier and its errors
"""
