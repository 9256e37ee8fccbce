"""Coordinator, kernel workers and evaluator: plain classes that work with or without Launchpad."""
