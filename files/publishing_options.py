"""The options of `push` and `refresh`, for `finedeep.convert` and for the command line, which must not import torch."""

from dataclasses import dataclass
from pathlib import Path

from .options import option


@dataclass(frozen=True)
class PushOptions:
    """How a folder is published."""

    private: bool = option(False, "make a new repository private; refuse a public one")
    revision: str | None = option(None, "branch to push to, made where it does not exist", metavar="BRANCH")
    create_pr: bool = option(False, "open a pull request instead")
    results: str | Path | None = option(
        None, "lm-eval's results JSON or a folder of such, for the card", metavar="PATH"
    )
    trust_remote_code: bool = option(False, "run the folder's code even where it is not this package's")


@dataclass(frozen=True)
class RefreshOptions:
    """How a model's code is brought up to date."""

    revision: str | None = option(None, "the branch of a Hub id (default: main)", metavar="BRANCH")
    create_pr: bool = option(False, "open a pull request instead")
    trust_remote_code: bool = option(False, "run the old code too, and compare logits")
    dry_run: bool = option(False, "say what would be changed, and change nothing")
