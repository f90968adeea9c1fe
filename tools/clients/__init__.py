"""Builds the clients of all languages whose toolchains are on this machine: for their tests and for the benchmarks."""
