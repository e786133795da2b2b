"""What decides a model's answers, so that those of one are not taken for another's."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from finedeep_files.commits import commit_of
from finedeep_files.hashing import sha256
from finedeep_files.masking import masked
from finedeep_files.versions import versions

PACKAGES = ("lm_eval", "scipy")  # beside those that decide a conversion
# The files of a model's folder that decide its answers.
DECISIVE = (
    *("*.safetensors", "*.bin", "*config.json", "tokenizer*", "*.model", "vocab*", "merges*", "adapter*"),
    *("special_tokens*", "added_tokens*"),
)
# Options that name another checkpoint, and a file that it has.
OTHERS = {"peft": "adapter_config.json", "delta": "config.json"}


def identity_of(model: str | Path, options: Mapping[str, Any]) -> str:
    """A name for a model as it is now, with options that decide its answers."""
    known = {key: files_of(value, OTHERS[key]) if key in OTHERS else value for key, value in masked(options).items()}
    place = str(Path(model).resolve()) if Path(model).is_dir() else str(model)
    files = files_of(model, revision=options.get("revision"))
    decisive = json.dumps([place, files, versions(*PACKAGES), known], sort_keys=True, default=str)
    return f"{Path(model).name}-{hashlib.sha256(decisive.encode()).hexdigest()[:16]}"


def files_of(model: str | Path, file: str = "config.json", revision: str | None = None) -> Any:
    """A folder's files, or the commit of a Hub id, which has `file`."""
    if Path(model).is_dir():
        return files_in(Path(model), DECISIVE)
    return commit_of(str(model), file, revision)


def weights_of(model: str | Path, revision: str | None = None) -> str:
    """What a report calls a model's weights: the commit of a Hub id, or a hash of a folder's safetensors files."""
    if not Path(model).is_dir():
        return f"revision {files_of(model, revision=revision)}"
    hashes = [sha256(path) for path in sorted(Path(model).glob("*.safetensors"))]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
    return f"sha256 {whole[:16]}"


def files_in(folder: Path, patterns: Iterable[str]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a folder's files."""
    found = {path for pattern in patterns for path in folder.glob(pattern)} if folder.is_dir() else ()
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(found)]
