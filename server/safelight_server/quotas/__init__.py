"""Quotas: how many requests a tenant may send, and how much compute it may use, in a time.

limits.py   the operator's file: limits by tenant, with a default
quotas.py   admits requests, charges compute, and lists what is left
"""
