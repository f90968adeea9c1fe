"""Measurements that the caches' constants were chosen by."""
