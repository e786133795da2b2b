"""Processes that need not import torch and transformers: a server has done so, and nothing of this project, and forks.

Each such import takes some seconds, of which a run of all tests would have minutes.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import huggingface_hub

FORKS = multiprocessing.get_context("forkserver")  # Python has but one such server
FORKS.set_forkserver_preload(["torch", "transformers.generation.utils", "transformers.models.llama.modeling_llama"])
PATIENCE = 300  # seconds


def run_forked(function, *arguments, processes=1):
    """What a function gives in each of some new processes, which find each other as those of torchrun do.

    Raises:
        AssertionError: with the traceback of the first that fails; the others are then ended.
    """
    started = {}
    for place in _places(processes):
        mine, other = FORKS.Pipe()
        process = FORKS.Process(target=_run, args=(function, arguments, place, other))
        process.start()
        other.close()
        started[mine] = process
    answers = {}
    try:
        while len(answers) < processes:
            ready = wait(started.keys() - answers.keys(), PATIENCE)
            assert ready, f"no answer for {PATIENCE} seconds"
            for mine in ready:
                try:
                    answers[mine], error = mine.recv()
                except EOFError:
                    error = "it died without an exception"
                assert error is None, error
    finally:
        for process in started.values():
            process.kill()  # if it is still there
            process.join()
    return [answers[mine] for mine in started]


def _places(processes):
    """For each process the variables by which it finds the others; none where it is alone."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "OMP_NUM_THREADS": 1}
    same |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    places = [{"RANK": number, "LOCAL_RANK": number, **same} for number in range(processes)]
    return [{name: str(value) for name, value in place.items()} for place in places]


def run_script(path, *arguments, environment=(), processes=1, cwd=None):
    """What a script with arguments prints, in each process; the modules beside it can be imported."""
    how = {"environment": dict(environment), "cwd": cwd}
    return run_forked(_run_script, [str(path), *map(str, arguments)], how, processes=processes)


def run_command(words, environment=(), processes=1, cwd=None, said="", largest_file=None):
    """`finedeep WORDS` in each process, as `CompletedProcess`es.

    Args:
        words: the command's arguments.
        environment: variables that the processes have beside this one's.
        processes: how many.
        cwd: where they run.
        said: what they read on stdin.
        largest_file: bytes, above which the system refuses to write a file.
    """
    if environment and huggingface_hub.__version__.startswith("0."):  # which reads its settings once for all
        command = [sys.executable, "-m", "finedeep_cli", *map(str, words)]
        return [subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=cwd)]
    how = {"environment": dict(environment), "cwd": cwd, "said": said, "largest_file": largest_file}
    return run_forked(_run_command, [*map(str, words)], how, processes=processes)


def _run(function, arguments, place, pipe):
    try:
        os.environ |= place
        if place:
            import torch

            torch.set_num_threads(1)
        pipe.send((function(*arguments), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def _settle(how):
    os.environ |= how["environment"]
    os.chdir(how["cwd"] or os.curdir)
    importlib.reload(huggingface_hub.constants)  # which hold what the environment was when the server imported them


def _run_script(words, how):
    _settle(how)
    sys.path.insert(0, str(Path(words[0]).parent))
    sys.argv = words
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(words[0], run_name="__main__")
    return out.getvalue()


def _run_command(words, how):
    _settle(how)
    sys.stdin = io.StringIO(how["said"])
    if how["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (how["largest_file"],) * 2)
    from finedeep_cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            status = main(words)
        except SystemExit as exit:  # argparse's
            status = exit.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), error.getvalue())
