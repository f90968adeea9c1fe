"""Builds the whole server from its settings, runs it, and drains it at the end."""
