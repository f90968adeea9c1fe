"""Several replicas on one Redis as if they were one.

news.py      what replicas tell each other at once
flight.py    one execution, wherever it runs: led here, followed from elsewhere, taken over from one that died
flights.py   what they share
landing.py   the end of one: picture, commit and bill, watchers
records.py   what is written of a generation so that another replica can go on with it
journal.py   writes a generation's events before any stream sees them
"""
