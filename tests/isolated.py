"""Run a script in a process of its own that cannot import this project, as a user's machine would."""

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import traceback

PREAMBLE = """
import sys
sys.modules["finedeep"] = None  # importing the project raises ImportError
import json, warnings
# as in pytest.ini
warnings.filterwarnings("error", category=DeprecationWarning, module="transformers_modules")
warnings.filterwarnings("error", category=FutureWarning, module=r"transformers_modules|torch\\.nn\\.modules\\.module")
"""
# A server that has imported what takes seconds, and nothing of this project, forks the processes; Python has but one.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.generation.utils", "transformers.models.llama.modeling_llama"])


def run_isolated(script, *arguments, **environment):
    """Run `script` with `arguments` in sys.argv[1:]; it sets `answer`, which comes back by way of JSON.

    A process that is to have another environment is begun anew, as libraries read theirs when they are imported.
    """
    code = PREAMBLE + textwrap.dedent(script)
    arguments = [*map(str, arguments)]
    if not environment:
        mine, other = FORKS.Pipe()
        process = FORKS.Process(target=run_forked, args=(code, arguments, other))
        process.start()
        other.close()
        try:
            answer, error = mine.recv() if mine.poll(300) else (None, "it has not answered for 300 seconds")
        except EOFError:
            answer, error = None, "it died without a word"
        process.kill()  # if it is still there
        process.join()
        assert error is None, error
        return json.loads(answer)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint('ANSWER' + json.dumps(answer))", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=os.environ["HF_HOME"],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rsplit("ANSWER", 1)[1])


def run_forked(code, arguments, pipe):
    """What a forked process does: run the code, send the answer as JSON, or what was raised."""
    names = {"__name__": "__main__"}
    try:
        assert "finedeep" not in sys.modules
        os.chdir(os.environ["HF_HOME"])
        sys.argv = ["isolated", *arguments]
        exec(compile(code, "isolated", "exec"), names)
        pipe.send((json.dumps(names["answer"]), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
