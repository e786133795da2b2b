"""Write a folder completely or not at all: in a hidden folder beside it, and moved into its place at the end.

The hidden folder of `NAME` is `.NAME.unfinished`:

    plan.json    what is to be made, and the names of all files that may be in here
    lock         held by the run at work
    result/      what will be `NAME`
    replaced/    what was `NAME`, while the result takes its place
    ...          whatever else a later run can continue from

It belongs to this project where it was just made or where it holds such a plan. Links, and anything that the plan does
not name, are a stranger's: they are refused by name and never removed. The same holds for a destination that is to be
overwritten, by the list of files in its receipt.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from .json_files import write_json
from .lock import locked
from .names import LISTED, RECEIPTS, Listed, Names, entries, is_scratch, remove_named, strangers
from .sizes import size
from .sync import sync_folder, sync_tree
from .whole_file import write_whole

# What a disk refuses whatever the file: it is full, a quota is used up, it is for reading only, or it is broken.
DISK = {errno.ENOSPC, errno.EROFS, errno.EIO, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
PLAN, LOCK, RESULT, REPLACED = "plan.json", "lock", "result", "replaced"


class DestinationError(ValueError):
    """Nothing can be written there. The message says what was found and what to do."""


@dataclass(frozen=True)
class Contents:
    """What a command's working folder may hold, as patterns of relative paths (see `Names`).

    Args:
        command: whose it is.
        result: the files of the finished folder.
        private: other files and those in other folders.
        kept: those of all, with `result/` before the result's, from which a later run can continue. While there is
            one, the folder is not removed or begun again unasked.
        receipt: the result's JSON file in which all files of the result are listed.
    """

    command: str
    result: tuple[str, ...]
    private: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    receipt: str | None = None


@dataclass(frozen=True)
class _Plan:
    """The content of plan.json."""

    finedeep: str  # the command
    files: list[str]
    kept: list[str]
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class WorkingFolder:
    """A destination and the hidden folder beside it.

    Args:
        destination: the folder to make.
        error: what to raise, with one line for the user.
        resume: whether to continue from what a stopped run of the same plan left. None: the command cannot.
        overwrite: whether a finished run's files at the destination, or a stopped run's, may be replaced. None: the
            command has no such option.
    """

    destination: Path
    error: type[ValueError] = DestinationError
    resume: bool | None = None
    overwrite: bool | None = None

    @property
    def path(self) -> Path:
        """The hidden folder."""
        return self.place.parent / f".{self.place.name}.unfinished"

    @property
    def result(self) -> Path:
        """The folder in it that will be the destination."""
        return self.path / RESULT

    @property
    def place(self) -> Path:
        """The destination's whole path."""
        return Path(os.path.abspath(self.destination))

    def check(self) -> None:
        """Raise `error` where the destination, or what a stopped run left, may not be replaced. Writes nothing."""
        try:
            self._check_destination()
            self._check_path()
        except OSError as error:
            raise self.error(f"{self.destination} cannot be used ({error.strerror}); name another folder.") from error

    def check_room(self, wanted: int) -> None:
        """Raise `error` where the disk has less room than `wanted` bytes, beside what a stopped run left."""
        place = next(parent for parent in [self.path, *self.path.parents] if parent.exists())
        left = sum(path.lstat().st_blocks * 512 for path in self.path.rglob("*")) if self.path.is_dir() else 0
        room = shutil.disk_usage(place).free + left
        if room < wanted:
            self._refuse(
                f"{self.destination} needs {size(wanted)} of disk, and {size(room)} are free. Make room or name a "
                "folder on another disk."
            )

    @contextmanager
    def begun(self, contents: Contents, plan: Mapping[str, Any]) -> Iterator[Path]:
        """Give `result` to write in, and move it to the destination at the end.

        Whatever else ends it, what `contents.kept` names stays, and the error has a note that says so; where there is
        no such thing, nothing is left.

        Args:
            contents: what the folder may hold.
            plan: what decides the result, as JSON: another run continues only from the same.

        Raises:
            error: as `check` does; or another run is at work, the plan is another one, or there is no permission or no
                room.
        """
        wanted = _Plan(
            contents.command,
            [*contents.private, *(f"{RESULT}/{name}" for name in contents.result)],
            list(contents.kept),
            json.loads(json.dumps(plan)),
        )
        with self._alone():
            try:
                self._begin(wanted)
            except (self.error, OSError) as error:
                if self._found() is None:
                    with suppress(OSError):  # no run has begun here: a lock is all there is
                        (self.path / LOCK).unlink(missing_ok=True)
                        self.path.rmdir()
                if isinstance(error, self.error):
                    raise
                raise self.error(f"{self.path} cannot be written ({error}); name another folder.") from error
            try:
                yield self.result
            except BaseException as error:
                if self._is_of_the_disk(error):
                    said = f"{self.destination} could not be written ({error}). Make room or name another folder."
                    refusal = self.error(said)
                    self._leave(wanted, refusal)
                    raise refusal from error
                self._leave(wanted, error)
                raise
            self._finish(contents, wanted)

    def _refuse(self, said: str) -> NoReturn:
        raise self.error(said)

    def _check_destination(self) -> None:
        place = self.destination
        if os.path.islink(place) or (os.path.exists(place) and not os.path.isdir(place)):
            self._refuse(f"{place} exists and is not a folder; name a folder that does not exist yet.")
        if os.path.isdir(place):
            if any(place.iterdir()):
                self._check_finished()
            if place.samefile(Path.cwd()) or os.path.ismount(place):
                what = "a mount point" if os.path.ismount(place) else "the current folder"
                self._refuse(f"{place} is {what}, which cannot be replaced as a whole; name a folder inside it.")
            return
        above = next(parent for parent in self.place.parents if os.path.lexists(parent))
        if not os.path.isdir(above):
            self._refuse(f"{place} cannot be made ({above} is not a folder); name another folder.")
        if not os.access(above, os.W_OK | os.X_OK):
            self._refuse(f"{place} cannot be made (no permission to write in {above}); name another folder.")

    def _check_finished(self) -> None:
        """Refuse what is at the destination, unless a finished run made it all and it is to be overwritten."""
        place = self.destination
        if self.overwrite is None:
            self._refuse(f"{place} is not empty; name another folder, or move that one away.")
        stranger = next(strangers(place, Listed(place)), None)
        if stranger is not None:
            self._refuse(
                f"{place} is not empty: {stranger.relative_to(place)} is on no finished run's list of files, and "
                "nothing of others is ever overwritten. Move it away or name another folder. (--overwrite replaces "
                "what a finished run has listed; --resume continues from a stopped one.)"
            )
        if self.overwrite:
            return
        if self._is_stopped():
            self._refuse(
                f"{place} is not empty: it holds a finished run, and {self.path} what a later one had finished when it "
                "stopped. --overwrite --resume continues that run and replaces the folder; --overwrite starts again."
            )
        if self.resume:
            self._refuse(f"{place} is finished: there is nothing to resume. --overwrite makes it again.")
        resume = "; --resume is for a stopped run, and there is none" if self.resume is not None else ""
        self._refuse(
            f"{place} is not empty: it holds a finished run. --overwrite replaces it{resume}. Or name another folder."
        )

    def _check_path(self) -> None:
        """Refuse a hidden folder that is not ours or holds a stranger's file, or that is worth asking about."""
        if not os.path.lexists(self.path):
            return
        away = "Move it away or name another destination."
        if os.path.islink(self.path) or not os.path.isdir(self.path):
            what = "a link" if os.path.islink(self.path) else "a file"
            self._refuse(f"{self.path} is {what}; a folder of that name is needed to work in. {away}")
        found = self._found()
        stranger = next(self._strangers(found), None)
        if stranger is not None:
            said = "which no run of finedeep wrote" if found else f"and no {PLAN} of finedeep"
            self._refuse(f"{self.path} holds {stranger.relative_to(self.path)}, {said}. {away}")
        if not (self.resume or self.overwrite) and self._is_stopped():
            ways = "--resume continues from it, --overwrite starts again."
            self._refuse(
                f"{self.path} holds what a stopped `finedeep {found.finedeep}` has finished. "
                f"{away if self.overwrite is None else ways}"
            )

    def _found(self) -> _Plan | None:
        """The plan in the hidden folder."""
        path = self.path / PLAN
        try:
            if path.is_symlink():
                return None
            found = _Plan(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        lists = (found.files, found.kept)
        whole = isinstance(found.plan, dict) and all(isinstance(names, list) for names in lists)
        return found if whole and all(isinstance(name, str) for names in lists for name in names) else None

    def _strangers(self, found: _Plan | None) -> Iterator[Path]:
        """What in the hidden folder is not ours. Before there is a plan, a lock may be there, or a plan's scratch."""
        replaced = self.path / REPLACED
        if found is None and os.path.lexists(self.path / PLAN):
            yield self.path / PLAN
        lock = self.path / LOCK
        if lock.is_file() and lock.stat().st_size:  # ours is empty
            yield lock
        for path in strangers(self.path, _own(found) if found else Names([PLAN, LOCK])):
            if replaced not in path.parents:
                yield path
        if replaced.is_dir() and not replaced.is_symlink():
            yield from strangers(replaced, Listed(replaced))

    def _is_stopped(self) -> bool:
        """Whether a stopped run has left something to continue from. (Without `result` it had finished.)"""
        found = self._found()
        return found is not None and self.result.is_dir() and self._has_kept(found)

    def _has_kept(self, plan: _Plan) -> bool:
        kept = Names(plan.kept)
        return any(kept.has_file(relative) and not is_scratch(path) for relative, path in entries(self.path))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Make the hidden folder, and keep every other run for the same destination out of it."""
        self.check()
        while True:
            lock = locked(self.path / LOCK)
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock.__enter__()
                break
            except FileNotFoundError:
                continue  # another run has just finished, and removed the folder
            except BlockingIOError as error:
                raise self.error(f"another run is writing {self.destination}; wait for it or stop it.") from error
            except OSError as error:
                raise self.error(
                    f"{self.destination} cannot be made ({error.strerror}); name another folder."
                ) from error
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def _begin(self, wanted: _Plan) -> None:
        """Leave in the hidden folder what can be continued from, and nothing else."""
        replaced = self.path / REPLACED
        if replaced.is_dir() and self.result.is_dir() and not os.path.lexists(self.place):
            replaced.rename(self.place)  # a run was killed just before the result took its place
        self.check()  # again: only now nobody else is at work
        found = self._found()
        if self.resume and found is not None:
            was, wish = ({"command": plan.finedeep, **plan.plan} for plan in (found, wanted))
            if was != wish:
                self._refuse(
                    f"the run to {self.destination} that stopped was another one: {differing(wish, was)} differ. Give "
                    "what it was started with, or start again with --overwrite instead of --resume."
                )
            remove_named(self.result, _of_result(found.files), but=_of_result(found.kept))
            self._remove_replaced()
        elif found is not None:
            self._remove_files(found)
        write_whole(self.path / PLAN, json.dumps(asdict(wanted)))
        self.result.mkdir(exist_ok=True)

    def _leave(self, plan: _Plan, error: BaseException) -> None:
        """After an error: keep what a later run can continue from, and say so, or remove all."""
        if self._has_kept(plan):
            ways = "--resume continues from it, --overwrite starts again."
            error.add_note(f"What is finished is kept in {self.path}: {ways}")
            return
        with suppress(OSError):
            self._remove(plan)

    def _finish(self, contents: Contents, plan: _Plan) -> None:
        """Move the result to its place, whole and on the disk."""
        made = f"What was made is whole, in {self.result}: move it from there, and it is kept."
        try:
            stranger = next(strangers(self.result, Names(contents.result)), None)
            if stranger is not None:
                self._refuse(f"{stranger} was not written by this run; nothing of others is taken along.")
            if contents.receipt is not None:
                self._list_files(self.result / contents.receipt)
            sync_tree(self.result)
            self._check_destination()
            replaced = self.path / REPLACED
            if self.place.is_dir():
                self.place.rename(replaced)
            self.result.rename(self.place)
            for folder in (self.path, self.path.parent):
                sync_folder(folder)
        except (self.error, OSError) as error:
            raise self.error(f"{error} {made}") from error
        with suppress(OSError):  # the destination is whole: what is left here does no harm
            self._remove(plan)

    def _is_of_the_disk(self, error: BaseException) -> bool:
        """Whether the system refused to write here. (A connection that breaks is an `OSError` too.)"""
        if not isinstance(error, OSError) or isinstance(error, ConnectionError | TimeoutError):
            return False
        places = [
            Path(os.path.abspath(name)) for name in (error.filename, error.filename2) if isinstance(name, str | Path)
        ]
        within = any(place.is_relative_to(home) for place in places for home in (self.path, self.place))
        return error.errno in DISK or (error.errno is not None and within)

    def _list_files(self, receipt: Path) -> None:
        known = json.loads(receipt.read_text(encoding="utf-8")) if receipt.exists() else {}
        paths = {relative for relative, path in entries(self.result) if path.is_file()}
        known[LISTED] = sorted({*paths, receipt.name})
        write_json(receipt, known)

    def _remove_files(self, plan: _Plan) -> None:
        """Remove what the plan names, and what was replaced."""
        self._remove_replaced()
        remove_named(self.path, _own(plan), but=Names([PLAN, LOCK]))

    def _remove_replaced(self) -> None:
        """Remove the files that its receipts list; those last, since they say whose the others are."""
        replaced = self.path / REPLACED
        if replaced.is_dir():
            listed = Listed(replaced)
            remove_named(replaced, listed, but=Names([RECEIPTS]))
            remove_named(replaced, listed)

    def _remove(self, plan: _Plan) -> None:
        """Remove all of ours; the plan last, and first what it would make a later run ask about."""
        if self._has_kept(plan):
            with suppress(OSError):  # on a full disk there is room only afterwards
                write_whole(self.path / PLAN, json.dumps(asdict(replace(plan, kept=[]))))
        self._remove_files(plan)
        for name in (PLAN, LOCK):
            (self.path / name).unlink(missing_ok=True)
        self.path.rmdir()


def _own(plan: _Plan) -> Names:
    return Names([PLAN, LOCK, *plan.files], folders=[RESULT, REPLACED])


def _of_result(names: list[str]) -> Names:
    return Names(name.removeprefix(f"{RESULT}/") for name in names if name.startswith(f"{RESULT}/"))


def differing(plan: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """The names of what two plans do not have in common."""
    return ", ".join(sorted(key for key in {*plan, *before} if plan.get(key) != before.get(key)))
