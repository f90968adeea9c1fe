"""Builds the clients of all languages whose toolchains are installed, for their tests and for the benchmarks."""
