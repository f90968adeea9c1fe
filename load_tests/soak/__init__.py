"""A long run of good callers beside hostile ones, `make soak`: memory stays flat, and good callers notice nothing."""
