"""How many false alarms the seasonal baselines give on synthetic traffic, compared with static thresholds."""
