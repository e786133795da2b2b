"""Scores by lm-evaluation-harness: local tasks, kept answers, and what has to be right before a model is scored."""
