"""Evaluation: suites of held-out tasks, and the scores of the episodes they produce."""
