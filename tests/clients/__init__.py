"""Tests of all languages' clients against a real server; clients/CONFORMANCE.md describes them."""
