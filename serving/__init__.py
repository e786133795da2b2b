"""Finedeep models in serving engines. Importing this package imports neither an engine nor torch."""
