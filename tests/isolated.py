"""Run a script in a fresh process that cannot import this project, as a user's machine would."""

import json
import os
import subprocess
import sys
import textwrap

PREAMBLE = """
import sys
sys.modules["finedeep"] = None  # importing the project raises ImportError
import json
"""


def run_isolated(script, *arguments, **environment):
    """Run `script` with `arguments` in sys.argv[1:]; it sets `answer`, which comes back by way of JSON."""
    code = PREAMBLE + textwrap.dedent(script) + "\nprint('ANSWER' + json.dumps(answer))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        cwd=os.environ["HF_HOME"],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rsplit("ANSWER", 1)[1])
