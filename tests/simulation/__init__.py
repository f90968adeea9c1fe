"""Fleets of replicas simulated from a seed, on a virtual clock, in one thread.

    clock.py     an event loop whose time jumps to the next timer, and hosts that can be frozen or killed in it
    service.py   the shared service (Redis' rules) and the network to it: lost and late requests and answers
    replica.py   the real registry, ownership and cluster code over an engine that only counts steps
    client.py    callers that reconnect to any replica, and everything that they have been shown
    schedule.py  one seed: what is asked for, what goes wrong and when, and what must hold

`python -m tests.simulation --schedules N --seed S` runs schedules S, S+1, ... and prints the seed that fails.
"""
