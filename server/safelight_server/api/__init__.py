"""gRPC services: recognizes the caller, checks its quota, answers the call or ends it with a status.

`call_limits.py` is in front of every call: its request must come in time.
`service.py` has every call of the contract. `identity.py` recognizes callers by
API key, `tokens.py` by a token of the OpenID provider whose keys `openid.py` has;
`quota.py` bounds their streams, `paging.py` cuts lists into pages; `health.py` and
`reflection.py` are gRPC's standard services.
"""
