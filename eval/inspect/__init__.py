"""What a model's FFNs do on a text: recorded as it goes by, summed up, drawn."""
