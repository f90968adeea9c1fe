"""What a tenant may ask for and compute in a time.

limits.py   the operator's file: limits by tenant, with a default
quotas.py   admits requests, charges compute, and lists what is left
"""
