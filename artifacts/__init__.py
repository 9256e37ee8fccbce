"""What a run keeps: its directory, checkpoints, distilled sets, report, pictures, TensorBoard."""
