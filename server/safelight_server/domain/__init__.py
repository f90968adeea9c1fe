"""The values that stages pass to each other; no I/O and no asyncio."""
