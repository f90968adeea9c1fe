"""The `safelight` command line: starts a server, and asks a running one for pictures."""
