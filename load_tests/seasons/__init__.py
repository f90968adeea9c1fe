"""How many false alarms the seasonal baselines give on made-up traffic, beside static thresholds."""
