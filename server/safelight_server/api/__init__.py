"""The gRPC services: who calls, whether the call is allowed, and the answer or the status."""
