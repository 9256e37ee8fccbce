"""Configurations: fields and defaults (schema.py), checks (validation.py), a file an experiment."""
