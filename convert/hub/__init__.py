"""The Hugging Face Hub: `card` (the model card), `push` (the upload and its proof), `refresh` (the code that is there).

`refusals` says what the Hub's errors mean, `standalone` what a process has of a model that cannot import this project.
"""

from .push import Push, push_folder
from .refresh import Refresh, refresh_code

__all__ = ["Push", "Refresh", "push_folder", "refresh_code"]
