"""A demonstration with no download: a generated world, a dense model of it, its Finedeep conversions, their scores."""

from .run import run_demo

__all__ = ["run_demo"]
