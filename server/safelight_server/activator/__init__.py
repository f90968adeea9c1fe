"""Holds the calls that come while a fleet has no replica, and forwards them when it has one (`safelight activator`).

    fleet.py      which replicas there are, by DNS
    activator.py  holds a call, then forwards it as bytes

It is the one process of a fleet that never scales to zero. It needs no GPU, no
model and no Redis. What it holds is a metric by which `safelight scaler` wakes
the fleet.
"""
