"""Calibration: after a cut with M >= 2, each layer is brought as near to the dense one as a text can teach it.

text                                    the tokens: of a text, or sampled from the dense model
residual_stream                         what enters and leaves each layer, of both models
neuron_statistics, least_squares        which neurons are active, which are nearly linear
closed_form                             two corrections by least squares
gradient                                then training, layer by layer
run                                     all of it, one layer after the other
"""

from .run import Calibration, LayerErrors

__all__ = ["Calibration", "LayerErrors"]
