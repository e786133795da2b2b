"""Run a script in a process of its own that cannot import this project, as a user's machine would."""

import json
import os
import subprocess
import sys
import textwrap

from forked import run_forked

PREAMBLE = """
import sys
sys.modules["finedeep"] = None  # importing the project raises ImportError
import json, warnings
# as in pytest.ini
warnings.filterwarnings("error", category=DeprecationWarning, module="transformers_modules")
warnings.filterwarnings("error", category=FutureWarning, module=r"transformers_modules|torch\\.nn\\.modules\\.module")
"""


def run_isolated(script, *arguments, **environment):
    """Run `script` with `arguments` in sys.argv[1:]; it sets `answer`, which comes back by way of JSON.

    A process that is to have another environment is begun anew, as libraries read theirs when they are imported.
    """
    code = PREAMBLE + textwrap.dedent(script)
    arguments = [*map(str, arguments)]
    if not environment:
        (answer,) = run_forked(answer_to, code, arguments)
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


def answer_to(code, arguments):
    """What a forked process does: run the code, give its answer as JSON."""
    assert "finedeep" not in sys.modules
    os.chdir(os.environ["HF_HOME"])
    names = {"__name__": "__main__"}
    sys.argv = ["isolated", *arguments]
    exec(compile(code, "isolated", "exec"), names)
    return json.dumps(names["answer"])
