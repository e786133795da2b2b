"""Calibration: after a cut with M >= 2, each layer is brought as near to the dense one as a text can teach it."""
