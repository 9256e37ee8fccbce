"""The method: state, plan and step of KIP and Label Solve, KRR, optimisers, evaluation. Neither servers nor files."""
