"""Which checkpoints of a stopped training can be gone on from."""

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME


def whole_checkpoints(folder: Path) -> list[Path]:
    """`Trainer`'s checkpoints in order, without one that a killed run has left half-made: it writes the state last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / TRAINER_STATE_NAME).is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
