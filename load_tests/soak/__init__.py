"""`make soak`: good and hostile callers together for a long time; memory must not grow, nor good callers be slowed."""
