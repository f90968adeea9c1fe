"""Tests of monitoring: rules, alerts and dashboards, on a real Prometheus."""
