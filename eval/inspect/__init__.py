"""What a model's FFNs do on a text.

recorder        hooks that add up what goes by
inspection      a text sent through a model, and what the sums say
plots           figures of it
"""
