"""One small file an experiment; `base.py` holds every field with its meaning, unit and default."""
