"""The program graph and what it takes to launch it."""
