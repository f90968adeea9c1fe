"""The composition root: builds every stage from the settings, serves, and drains."""
