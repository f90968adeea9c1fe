"""Holds the calls that come while a fleet has no replica, and forwards them when it has one (`safelight activator`).

    fleet.py         which addresses the replicas have, by DNS
    connector.py     makes connections to a replica: gRPC and HTTP, with TLS
    replicas.py      the replicas, with the connections that all calls share
    waiting_room.py  gives each call a replica; while there is none, the call waits here
    grpc_calls.py    forwards a call of gRPC as bytes
    http_calls.py    forwards a request of HTTP as bytes
    http_app.py      the routes of HTTP

It is the one process of a fleet that never scales to zero. It needs no GPU, no
model and no Redis. The number of calls that it holds is a metric by which `safelight scaler`
wakes the fleet.
"""
