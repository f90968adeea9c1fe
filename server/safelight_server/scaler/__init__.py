"""Says how many replicas a fleet needs, before the load is there: an external scaler for KEDA (`safelight scaler`).

    prometheus.py  reads what the replicas export, now and over the last weeks
    forecast.py    the demand in 15 and 30 minutes, from that history
    demand.py      the replicas that the queue, the deadlines and the forecast need; pure
    service.py     KEDA's gRPC contract

It runs beside the fleet and not in it. The extra `scaler` installs what the
forecast needs.
"""
