"""Where results are written: one rule for every command.

It imports neither torch nor transformers, so that a command can refuse before it waits for them.
"""
