"""Healing: distillation of the whole converted model from its dense teacher."""
