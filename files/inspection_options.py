"""The options of an inspection, for `finedeep.eval` and for the command line, which must not import torch."""

from dataclasses import dataclass

from .evaluation_options import DTYPES
from .options import option


@dataclass(frozen=True)
class InspectionOptions:
    """How much of a text is read, and by what."""

    tokens: int = option(65_536, "of the text at most (default: %(default)s)", metavar="N", least=1)
    device: str | None = option(None, "such as cpu or cuda:0 (default: a GPU where there is one)")
    dtype: str = option("auto", "default: auto, the checkpoint's own", choices=DTYPES)
