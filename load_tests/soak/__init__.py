"""Good and hostile callers together for long, `make soak`: memory stays flat, and good callers are not slowed."""
