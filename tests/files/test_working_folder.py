"""Whose a folder is, what of it may go, and what is left when a run ends at any moment."""

import builtins
import errno
import importlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import finedeep_files.lock
import pytest
from finedeep_cli import main
from finedeep_files import sync, working_folder
from finedeep_files.lock import locked
from finedeep_files.working_folder import PLAN, Contents, DestinationError, WorkingFolder

CONTENTS = Contents(
    command="make",
    result=("weights", "finedeep_made.json"),
    private=("layer-*", "training/*"),
    kept=("layer-*",),
    receipt="finedeep_made.json",
)


def make(destination, content="new", stop=None, **options):
    work = WorkingFolder(destination, **{"resume": False, "overwrite": False, **options})
    with work.begun(CONTENTS, {"content": content}) as result:
        (work.path / "layer-0").write_text(content)
        (work.path / "training/checkpoint-1").mkdir(parents=True, exist_ok=True)
        (work.path / "training/checkpoint-1/state").write_text(content)
        if stop:
            raise stop
        (result / "weights").write_text(content)


def stopped(destination, content="new", error=KeyboardInterrupt, **options):
    with pytest.raises(error, match="--resume continues from it, --overwrite starts again"):
        make(destination, content, stop=error(), **options)


def tree(folder):
    """All below, by relative path: a file's content, a link's target."""
    return {
        path.relative_to(folder).as_posix(): path.readlink() if path.is_symlink() else path.is_dir() or path.read_text()
        for path in sorted(folder.rglob("*"))
    }


COMMANDS = {
    "convert": ["any", "out"],
    "heal": ["any", "out", "--data", "any"],
    "eval": ["any", "--tasks", "any", "--output", "out"],
    "inspect": ["any", "--text", "any", "--output", "out"],
    "export": ["any", "out"],
}


@pytest.fixture(params=COMMANDS)
def words(request, tmp_path, monkeypatch):
    """A command that would write `out`, and whose model is not looked for before that is known to be possible."""
    monkeypatch.chdir(tmp_path)
    return [request.param, *COMMANDS[request.param]]


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_link_in_the_place_of_the_hidden_folder_is_not_followed(tmp_path, capsys, words, flags):
    if (set(flags) - {"--overwrite"} and words[0] == "inspect") or (flags and words[0] == "export"):
        pytest.skip("has no such option")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/thesis.txt").write_text("years of work")
    (tmp_path / ".out.unfinished").symlink_to("victim")
    before = tree(tmp_path)
    assert main([*words, *flags]) == 2
    assert ".out.unfinished is a link" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["thesis.txt", "sub/thesis.txt", "plan.json", "model.safetensors"])
def test_a_hidden_folder_of_others_is_refused(tmp_path, capsys, words, name):
    path = tmp_path / ".out.unfinished" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"a plan": "of others"}')
    before = tree(tmp_path)
    assert main(words) == 2
    assert re.search(r"\.out\.unfinished holds \S+, and no plan\.json of finedeep", capsys.readouterr().err)
    assert tree(tmp_path) == before


def test_a_destination_of_others_is_refused_before_the_model_is_looked_for(tmp_path, capsys, words):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    before = tree(tmp_path)
    for flags in [[]] if words[0] == "export" else [[], ["--overwrite"]]:
        assert main([*words, *flags]) == 2
        said = capsys.readouterr().err
        assert "out is not empty" in said
        assert words[0] == "export" or all(name in said for name in ("thesis.txt", "--overwrite", "--resume"))
    assert tree(tmp_path) == before


def test_a_refusal_does_not_wait_for_torch(tmp_path):
    """Some seconds of importing it, for each attempt to find a free name."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").touch()
    every = [[name, *words] for name, words in COMMANDS.items()]
    script = f"import sys; from finedeep_cli import main; codes = {{main(words) for words in {every}}}; "
    script += "print(codes, {'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "{2} set()\n"


MISSING = {
    "convert --calibrate": ["convert", "model", "out", "--calibrate", "no.txt"],
    "convert --assignment-text": ["convert", "model", "out", "--assignment-text", "no.txt"],
    "convert SRC": ["convert", "./no", "out"],
    "heal DIR": ["heal", "./no", "out", "--data", "any"],
    "heal --teacher": ["heal", "model", "out", "--teacher", "./no"],
    "eval MODEL": ["eval", "./no", "--tasks", "any"],
    "eval --baseline": ["eval", "model", "--baseline", "./no", "--tasks", "any"],
    "eval --text": ["eval", "model", "--baseline", "model", "--text", "no.txt", "--tasks", "any"],
    "eval --local": ["eval", "model", "--local", "./no"],
    "eval --include-path": ["eval", "model", "--tasks", "any", "--include-path", "./no"],
    "inspect MODEL": ["inspect", "./no", "--text", "text.txt"],
    "inspect --text": ["inspect", "model", "--text", "no.txt"],
    "export SRC": ["export", "./no", "out"],
}


def test_nor_does_an_input_that_is_not_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").touch()
    script = f"import sys; from finedeep_cli import main; print([main(words) for words in {list(MISSING.values())}], "
    script += "{'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{[2] * len(MISSING)} set()\n"
    assert all(re.search(r"no(\.txt)? (cannot be read: it )?does not exist; name", s) for s in done.stderr.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_whatever_ends_a_run_what_is_finished_is_kept(tmp_path):
    out = tmp_path / "out"
    for error in (KeyboardInterrupt, SystemExit, RuntimeError, MemoryError):
        stopped(out, error=error, overwrite=True)
        with pytest.raises(DestinationError, match="--resume continues from it, --overwrite starts again"):
            make(out)
        assert (tmp_path / ".out.unfinished/layer-0").read_text() == "new"
    with pytest.raises(DestinationError, match="another one: content differ"):
        make(out, "other", resume=True)
    make(out, resume=True)
    assert sorted(tree(tmp_path)) == ["out", "out/finedeep_made.json", "out/weights"]


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), WorkingFolder(tmp_path / "out").begun(CONTENTS, {}) as result:  # noqa: PT012
        (result / "weights").touch()
        raise RuntimeError
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("kept", [False, True])
def test_on_a_full_disk_what_is_worth_nothing_is_removed(tmp_path, monkeypatch, kept):
    usual, full = Path.write_text, []

    def write_text(path, *given, **named):
        if full and path.name.startswith(".plan"):
            usual(path, "")  # a name there is room for
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return usual(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", write_text)
    work = WorkingFolder(tmp_path / "out", resume=False, overwrite=False)

    def fill():
        with work.begun(CONTENTS, {}) as result:
            (result / "weights").write_text("half")
            if kept:
                (work.path / "layer-0").write_text("whole")
            full.append(True)
            raise OSError(errno.ENOSPC, "No space left on device", str(result / "weights"))

    with pytest.raises(DestinationError, match="No space left"):
        fill()
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == ({"weights", "layer-0", "plan.json", "lock"} if kept else set())


def test_an_error_of_other_files_is_not_the_destinations(tmp_path):
    work = WorkingFolder(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"order\.txt"), work.begun(CONTENTS, {}):
        (tmp_path / "order.txt").read_text()
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_replaced_only_where_that_is_said_and_only_its_own_files(tmp_path):
    out = tmp_path / "out"
    make(out, "old")
    with pytest.raises(
        DestinationError, match=r"finished run\. --overwrite replaces it; --resume is for a stopped run"
    ):
        make(out)
    with pytest.raises(DestinationError, match="is finished: there is nothing to resume"):
        make(out, resume=True)
    stopped(out, overwrite=True)
    assert (out / "weights").read_text() == "old"
    with pytest.raises(DestinationError, match="--overwrite --resume continues that run"):
        make(out, resume=True)
    make(out, resume=True, overwrite=True)
    assert (out / "weights").read_text() == "new"
    (out / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(DestinationError, match=r"notes\.txt is on no finished run's list"):
        make(out, "newer", overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["notes.txt", "result/notes.txt", "sub/notes.txt", "replaced/notes.txt"])
@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_of_a_folder_of_ours_nothing_of_others_is_removed(tmp_path, place, options):
    stopped(tmp_path / "out")
    mine = tmp_path / ".out.unfinished" / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(DestinationError, match=f"holds {place}, which no run of finedeep wrote"):
        make(tmp_path / "out", **options)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["layer-1", "training", "result", "plan.json", "lock"])
def test_links_in_a_folder_of_ours_are_not_followed(tmp_path, name):
    stopped(tmp_path / "out")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/thesis.txt").write_text("years of work")
    link = tmp_path / ".out.unfinished" / name
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / "victim")
    with pytest.raises(DestinationError, match=f"holds (layer-0|{name})"):
        make(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "victim") == {"thesis.txt": "years of work"}
    assert link.is_symlink()


def test_a_file_that_others_put_into_the_result_meanwhile_is_not_published(tmp_path):
    said = r"notes\.txt was not written by this run.* What was made is whole"
    work = WorkingFolder(tmp_path / "out").begun(CONTENTS, {})
    with pytest.raises(DestinationError, match=said), work as result:  # noqa: PT012
        (result / "weights").touch()
        (result / "notes.txt").touch()
    assert not (tmp_path / "out").exists()
    assert (result / "weights").exists()


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("before", ["nothing", "finished", "stopped"])
def test_killed_at_any_step_of_beginning_or_finishing(tmp_path, monkeypatch, before):
    """Afterwards old or new is there, whole, or comes back; and the next run neither loses nor stumbles over it."""
    steps = ("unlink", "rename", "rmdir", "replace", "mkdir")
    usual = {name: getattr(Path, name) for name in steps}
    for last in range(1, 60):
        out = tmp_path / f"{last}/out"
        if before != "nothing":
            make(out, "old")
        if before == "stopped":
            stopped(out, "new", overwrite=True)
        left = last
        with monkeypatch.context() as patch:

            def step(name):
                def act(self, *arguments, **more):
                    nonlocal left
                    left -= 1
                    if left <= 0:
                        raise KilledError
                    return usual[name](self, *arguments, **more)

                return act

            for name in steps:
                patch.setattr(Path, name, step(name))
            patch.setattr(os, "getpid", lambda: 1)  # the next run is another process
            with suppress(KilledError):
                make(out, "new", overwrite=True, resume=before == "stopped")
        if out.exists():
            assert (out / "weights").read_text() in ("old", "new")
        make(out, "new", overwrite=True)
        assert (out / "weights").read_text() == "new"
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        if left > 0:
            return
    pytest.fail("more steps than were tried")


def test_the_folders_names_are_brought_to_the_disk_too(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor):
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}") if folder else None)

    monkeypatch.setattr(sync.os, "fsync", fsync)
    make(tmp_path / "out")
    assert synced.count(None) == 2
    assert [str(tmp_path / ".out.unfinished/result"), str(tmp_path)] == [synced[2], synced[-1]]


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """Its holder removes it with the folder; who waited would else be at work beside whoever makes the next one."""
    path, flock = tmp_path / "lock", finedeep_files.lock._flock
    calls = []

    def removed_meanwhile(descriptor, wait):
        flock(descriptor, wait)
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()

    monkeypatch.setattr(finedeep_files.lock, "_flock", removed_meanwhile)
    with locked(path):
        assert len(calls) == 2
        monkeypatch.undo()
        with pytest.raises(BlockingIOError), locked(path):
            pass


def test_without_fcntl_as_on_windows(tmp_path, monkeypatch):
    usual = builtins.__import__

    def no_fcntl(name, *arguments):
        if name == "fcntl":
            raise ImportError(name)
        return usual(name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", no_fcntl)
        importlib.reload(finedeep_files.lock)
        patch.setattr(working_folder, "locked", finedeep_files.lock.locked)
        make(tmp_path / "out")
    importlib.reload(finedeep_files.lock)
    assert (tmp_path / "out/weights").read_text() == "new"


def test_a_plan_that_is_no_plan(tmp_path):
    stopped(tmp_path / "out")
    path = tmp_path / ".out.unfinished" / PLAN
    whole = json.loads(path.read_text())
    for broken in ("", "[]", "{}", json.dumps({**whole, "files": "*"}), json.dumps({**whole, "plan": 3})):
        path.write_text(broken)
        with pytest.raises(DestinationError, match=r"and no plan\.json of finedeep"):
            make(tmp_path / "out", overwrite=True)
