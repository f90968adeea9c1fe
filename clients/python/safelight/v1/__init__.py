"""Generated from `proto/safelight/v1/` by `make generate`."""
