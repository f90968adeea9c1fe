"""Computes how many replicas a fleet needs, ahead of the load: an external scaler for KEDA (`safelight scaler`).

    prometheus.py  reads the metrics of the replicas, now and over the last weeks
    forecast.py    the demand in 15 and 30 minutes, from that history
    demand.py      the replicas that the queue, the deadlines and the forecast need; pure
    service.py     KEDA's gRPC contract

It runs as a process of its own. The extra `scaler` installs the libraries of the
forecast.
"""
