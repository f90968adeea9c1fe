"""What was computed once and need not be computed again."""
