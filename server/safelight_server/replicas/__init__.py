"""Several replicas on one Redis as if they were one.

news.py      what replicas tell each other at once
flights.py   one execution, wherever it runs: led here, followed from elsewhere, taken over from one that died
records.py   what is written of a generation so that another replica can go on with it
journal.py   writes a generation's events before any stream sees them
"""
