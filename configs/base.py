"""The defaults of every configuration file: KIP as published, on scikit-learn's digits."""

from typing import Any

import ml_collections

from configs import schema


def get_config() -> Any:  # type checkers cannot know a ConfigDict's attributes
  """All fields of configs/schema.py with their defaults, as an ml_collections.ConfigDict."""
  return ml_collections.ConfigDict(schema.Config().to_dict())
