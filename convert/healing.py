"""The name of `convert.heal` before it was a room, for code that imports it."""

from .heal import HealingOptions, heal

__all__ = ["HealingOptions", "heal"]
