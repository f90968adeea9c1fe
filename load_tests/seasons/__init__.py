"""Counts the false alarms of the seasonal baselines on synthetic traffic, compared with static thresholds."""
