"""Which commit of the Hub a model is at."""

from pathlib import Path

from huggingface_hub import hf_hub_download


def commit_of(model: str, file: str = "config.json", revision: str | None = None) -> str:
    """The commit that a branch, tag or commit of a Hub id, which has `file`, stands for; by default main's."""
    return Path(hf_hub_download(model, file, revision=revision)).parent.name  # snapshots/COMMIT/file
