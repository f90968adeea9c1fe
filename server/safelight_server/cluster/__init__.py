"""Several replicas on one Redis that work as one server.

leased_runner.py    runs one execution: here under a lease, or followed from the replica that holds the lease
leased_runners.py   what the executions of this replica share
commit.py           the end of an execution: picture, commit with the bill, watchers
bills.py            the bill of a committed picture, sealed in Redis
bill_archive.py     copies bills from Redis to the ledger
ledger.py           bills in a table of DynamoDB: keys, items, reading
bulletin.py         short messages between replicas
records.py          the stored form of a generation and its events
journal.py          writes a generation's events before any stream sees them
"""
