"""Bring the code of a folder or a Hub repository up to the installed package's, and leave the weights as they are."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finedeep_files.errors import ConversionError, one_line
from finedeep_files.inputs import check_model
from finedeep_files.json_files import as_json, read_json
from finedeep_files.names import LISTED
from finedeep_files.options import takes_options
from finedeep_files.publishing_options import RefreshOptions
from finedeep_files.versions import versions
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from ...configuration_finedeep import AUTO_MAP, FinedeepConfig, __version__
from ..code_files import CODE, CODE_FILES, MARKED, UNMARKED, auto_map_of, is_newer, missing_code, version_in
from ..receipt import RECEIPT, read_receipt
from ..source import CARD, check_finedeep
from .refusals import hub_errors
from .standalone import standalone_logits

# How far the logits of old and new code may be apart, as a share of the largest: some roundings of the dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Refresh:
    """What a refresh did, or would do.

    `before` is the version that the code was of, None where it does not say; `changes` has for each file what happens
    to it; `difference` is the largest one between logits, None where they were not compared; `url` and `revision` are
    of the commit on the Hub.
    """

    before: str | None
    changes: Mapping[str, str]
    difference: float | None = None
    not_compared: str | None = None
    url: str | None = None
    revision: str | None = None


@takes_options(RefreshOptions)
def refresh_code(model: str | Path, **options: Any) -> Refresh:
    """Give a Finedeep model the installed package's code and the references to it in its config.json.

    None of the model's own code is run unless `trust_remote_code` is set. Then logits on a few tokens are compared,
    with the old code and the new, each in a process of its own, and where they differ nothing is changed.

    Args:
        model: a folder, with or without code, or a Hub id. A repository on the Hub is changed by a commit.
        options: the fields of `RefreshOptions`. `revision` is a branch of the Hub's repository, by default main;
            `create_pr` opens a pull request instead; `trust_remote_code` runs the old code, to compare (the model is
            then held in memory, and of a Hub id it is downloaded whole); `dry_run` changes nothing.

    Raises:
        ConversionError: it is no Finedeep model, its configuration is not understood, it is of a newer version, logits
            differ, or the folder or the repository cannot be written. Nothing has then been changed, unless the Hub
            took the code and not the card that pins it; the same command again then writes the card.
    """
    o, folder, commit = RefreshOptions(**options), Path(model), None
    if not folder.is_dir():
        folder, commit = _fetched(model, o.revision, whole=o.trust_remote_code)
    elif o.revision or o.create_pr:
        raise ConversionError(f"{model} is a folder; a revision and a pull request are of a Hub id.")
    config = _understood(folder)
    before = version_in(folder / MARKED)
    files = _wanted_files(folder, config)
    changes = {name: _change(folder / name) for name in files}
    if not changes:
        return _with_card(str(model), commit, o) if commit is not None else Refresh(before, {})
    difference, not_compared = None, None
    if o.trust_remote_code:
        difference, not_compared = _compared(folder, config, files)
    if (folder / RECEIPT).is_file():
        files[RECEIPT] = _receipt(folder, before, difference, files)
        changes[RECEIPT] = "notes the refresh"
    url, made = None, None
    if commit is None and not o.dry_run:
        _write_together(folder, files)
    elif not o.dry_run:
        url, made = _commit(str(model), commit, o.revision, o.create_pr, files)
    return Refresh(before, changes, difference, not_compared, url, made)


def _fetched(model: str | Path, revision: str | None, whole: bool) -> tuple[Path, str]:
    """The part of a repository that is needed, and the commit that it is of."""
    check_model(model, ConversionError)
    patterns = ["config.json", CODE, RECEIPT, CARD]
    try:
        folder = Path(snapshot_download(str(model), revision=revision, allow_patterns=None if whole else patterns))
    except Exception as error:  # which they are, depends on the version of huggingface_hub
        raise ConversionError(
            f"{model} is not a folder here, and could not be fetched from the Hub ({one_line(error)}). Check the path "
            "or the id, and for private models log in with `hf auth login`."
        ) from error
    return folder, folder.name


def _understood(folder: Path) -> dict[str, Any]:
    """A folder's configuration, when this version of the package knows what it means."""
    path = folder / "config.json"
    config = read_json(path, "the model's configuration")
    check_finedeep(config, str(path))
    for place, version in ((path, config.get("finedeep_version")), (folder / MARKED, version_in(folder / MARKED))):
        if isinstance(version, str) and is_newer(version):
            raise ConversionError(
                f"{place} is of Finedeep {version}, newer than the installed {__version__}; update the package."
            )
    try:
        FinedeepConfig.from_dict(config)
    except Exception as error:  # a value of a wrong type can raise anything
        raise ConversionError(
            f"{path} is not a configuration that Finedeep {__version__} knows: {one_line(error)}"
        ) from error
    return config


def _wanted_files(folder: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """Name and content of each file that is not in the folder as it should be."""
    files = {file.name: file.read_bytes() for file in CODE_FILES}
    fields = {"auto_map": auto_map_of(config) | AUTO_MAP, "finedeep_version": __version__}
    if any(config.get(key) != value for key, value in fields.items()):
        files["config.json"] = as_json(dict(config) | fields).encode()
    return {name: content for name, content in files.items() if not _holds(folder / name, content)}


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _change(path: Path) -> str:
    if path.name == "config.json":
        return "auto_map and finedeep_version set"
    return "replaced" if path.is_file() else "added"


def _compared(folder: Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[float | None, str | None]:
    """The largest difference of logits, old code against new; or None, and why there is nothing to compare.

    Raises `ConversionError` where they differ by more than rounding, or the new code does not run.
    """
    old, why = None, None
    if missing := missing_code(folder, config):
        why = f"its code lacks {', '.join(missing)}"
    elif not auto_map_of(config):
        why = "its config.json names no code"
    else:
        try:
            old = standalone_logits(str(folder.resolve()))
        except ConversionError as error:  # which may be the reason for the refresh
            why = f"with the old code, {one_line(error)}"
    with tempfile.TemporaryDirectory(prefix="finedeep-refresh-") as scratch:
        for path in folder.resolve().iterdir():
            if path.name not in files:
                (Path(scratch) / path.name).symlink_to(path)
        for name, content in files.items():
            (Path(scratch) / name).write_bytes(content)
        new = standalone_logits(scratch)
    if old is None:
        return None, why
    difference = (new.double() - old.double()).abs().max().item()
    if old.dtype != new.dtype or difference > TOLERANCE[new.dtype] * old.abs().max().item():
        raise ConversionError(
            f"{folder} gives other logits with the new code than with the old (by {difference:.3g}). Nothing was "
            "changed."
        )
    return difference, None


def _receipt(folder: Path, before: str | None, difference: float | None, files: Mapping[str, bytes]) -> bytes:
    note = {"from": before, "logits_differ_by": difference, "versions": versions()}
    receipt = read_receipt(folder)
    if isinstance(receipt.get(LISTED), list):  # what is on it may be overwritten by a later conversion
        receipt[LISTED] = sorted({*receipt[LISTED], *files})
    return as_json({**receipt, "refreshed": note}).encode()


def _write_together(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files into a folder, all or none of them: each is written beside its place, and then all are moved.

    A process that is killed between two moves leaves some old and some new; the same command again completes it, and
    removes what the killed one was writing.
    """
    _remove_scratch(folder, files)
    new = {folder / name: folder / f".{name}.{os.getpid()}.new" for name in files}
    old = {path: path.with_name(f".{path.name}.{os.getpid()}.old") for path in new}
    moved = []
    try:
        for path, scratch in new.items():
            with scratch.open("wb") as file:
                file.write(files[path.name])
                file.flush()
                os.fsync(file.fileno())
            if path.is_file():
                shutil.copy2(path, old[path], follow_symlinks=False)
        for path, scratch in new.items():
            moved.append(path)
            scratch.replace(path)
    except BaseException as error:
        for path in moved:
            if old[path].exists():
                old[path].replace(path)
            elif not new[path].exists():
                path.unlink()
        if isinstance(error, OSError):
            raise ConversionError(f"{folder} cannot be written ({error}). Nothing was changed.") from error
        raise
    finally:
        for scratch in (*new.values(), *old.values()):
            with suppress(OSError):
                scratch.unlink()


def _remove_scratch(folder: Path, names: Iterable[str]) -> None:
    """Remove what processes that were killed have left of `_write_together`."""
    left = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.\d+\.(new|old)")
    for path in folder.iterdir():
        if left.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


def _with_card(repo_id: str, commit: str, o: RefreshOptions) -> Refresh:
    """What is to be done where a repository's code is this package's: its card may still pin older code."""
    card = _card(repo_id, commit)
    pinned = _pin_of(repo_id).search(card)
    if pinned is None:
        return Refresh(__version__, {})
    try:
        then = Path(snapshot_download(repo_id, revision=pinned[2], allow_patterns=[CODE]))
    except Exception:  # the revision has gone, or never was
        then = None
    if then is not None and all(_holds(then / file.name, file.read_bytes()) for file in CODE_FILES):
        return Refresh(__version__, {})
    changes = {CARD: "pins the revision with the code"}
    if o.dry_run:
        return Refresh(__version__, changes)
    api = HfApi()
    with hub_errors(repo_id):
        done = _commit_card(api, repo_id, card, commit, o.revision, create_pr=o.create_pr)
    return Refresh(__version__, changes, url=done.pr_url or f"{api.endpoint}/{repo_id}", revision=commit)


def _card(repo_id: str, commit: str) -> str:
    """The text of a repository's card, "" where there is none."""
    card = Path(snapshot_download(repo_id, revision=commit, allow_patterns=[CARD])) / CARD
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def _pin_of(repo_id: str) -> re.Pattern:
    """What in a card pins a revision of the repository that it is of; cards name other models too."""
    return re.compile(rf'("{re.escape(repo_id)}",\s*revision=")([0-9a-f]{{40}})"')


def _commit_card(
    api: HfApi, repo_id: str, card: str, commit: str, revision: str | None, create_pr: bool = False
) -> CommitInfo:
    """Commit a card that pins a commit."""
    text = _pin_of(repo_id).sub(rf'\g<1>{commit}"', card)
    return api.create_commit(
        repo_id,
        _additions({CARD: text.encode()}),
        commit_message="Model card, with the revision of the code",
        revision=revision,
        create_pr=create_pr,
    )


def _commit(
    repo_id: str, parent: str, revision: str | None, create_pr: bool, files: Mapping[str, bytes]
) -> tuple[str, str]:
    """Commit files on top of a known commit. A card that pins a revision then pins this one."""
    api = HfApi()
    disable_progress_bars()
    with hub_errors(repo_id):
        done = api.create_commit(
            repo_id,
            _additions(files),
            commit_message=f"Code of Finedeep {__version__}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
        card = _card(repo_id, parent)
        if _pin_of(repo_id).search(card):
            _commit_card(api, repo_id, card, done.oid, done.pr_revision or revision)
    return done.pr_url or f"{api.endpoint}/{repo_id}", done.oid


def _additions(files: Mapping[str, bytes]) -> Sequence[CommitOperationAdd]:
    return [CommitOperationAdd(name, content) for name, content in files.items()]


def summary_of(model: str | Path, done: Refresh, dry_run: bool = False) -> str:
    """What was done, in a few lines."""
    if not done.changes:
        return f"{model}: its code is that of Finedeep {__version__}; nothing to do"
    verb = "would go" if dry_run else "went"
    lines = [f"{model}: {verb} from Finedeep {done.before or UNMARKED} to {__version__}; weights untouched"]
    lines += [f"  {name}: {change}" for name, change in done.changes.items()]
    if done.difference is not None:
        lines.append(f"  logits with the old code and the new: largest difference {done.difference:.3g}")
    if done.not_compared:
        lines.append(f"  logits were not compared, but the new code runs: {done.not_compared}")
    if done.url:
        lines.append(f"  {done.url} at revision {done.revision}")
    return "\n".join(lines)
