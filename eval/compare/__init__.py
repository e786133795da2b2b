"""Scores of two models: sample by sample, with paired statistics, verdicts and a table."""
