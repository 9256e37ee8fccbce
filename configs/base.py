"""The defaults of every configuration file: KIP as published, on scikit-learn's digits."""

import ml_collections

from configs import schema


def get_config() -> ml_collections.ConfigDict:
  """All fields of configs/schema.py with their defaults."""
  return ml_collections.ConfigDict(schema.Config().to_dict())
