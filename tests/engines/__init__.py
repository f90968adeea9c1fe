"""Tests of game and media engines on the C client: each shows a real picture, which is compared."""
