"""Scores of two models, compared sample by sample.

scores                  the harness's results, as scores
paired_statistics       whether a difference is more than chance
comparison              verdicts, and the sentences and tables that tell of them
table                   scores side by side
"""
