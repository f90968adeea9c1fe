"""Engines on the C client, without a screen: each shows a real picture, which is compared."""
