"""Measurements from which the caches' constants were chosen."""
