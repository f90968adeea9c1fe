"""Tests of what watches a fleet: rules, alerts and dashboards, against a real Prometheus."""
