"""Publish a Finedeep folder on the Hub, and prove that what is there is what was here."""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars

from .card import make_card, read_comparison, read_scores
from .errors import ConversionError
from .receipt import RECEIPT, read_receipt
from .source import MORE_TEMPLATES, read_json

# In a process that cannot import this project: what anybody gets who has the folder or the id alone.
FINGERPRINT = """
import sys
sys.modules["finedeep"] = None
import hashlib, logging, os
logging.disable(logging.WARNING)
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
from transformers import AutoModelForCausalLM
torch.manual_seed(0)
name, revision = sys.argv[1], sys.argv[2] or None
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True, dtype="auto").eval()
ids = torch.randint(model.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model(ids).logits.float().contiguous()
assert torch.isfinite(logits).all(), "its logits are not finite"
print("FINGERPRINT", hashlib.sha256(logits.numpy().tobytes()).hexdigest())
"""
CARD = "README.md"
CACHES = ("HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE")  # the second in transformers 4
# What an HTTP status of the Hub means for somebody who pushes, and what to do.
REASONS = {
    401: "the token was refused; log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    402: "the account's storage is full; free some of it or enlarge it",
    403: "this token may not write there, or the storage quota is used up; use another token or free some storage",
    404: "there is no such repository or revision, or this token may not see it",
    409: "somebody else has changed the repository meanwhile; run the same command again",
    413: "a file is larger than the Hub takes; convert with a smaller --max-shard-size",
    429: "too many requests; wait, then run the same command again",
}
AGAIN = "run the same command again: files that have arrived are not sent twice"


@dataclass(frozen=True)
class Push:
    """Where a model is now. `revision` is the commit that holds weights and code; the card came after it."""

    repo_id: str
    revision: str
    url: str


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    results: str | Path | None = None,
    say: bool = True,
) -> Push:
    """Upload a converted model with a model card, and check that it comes back the same.

    Before uploading, the folder is loaded in a process that has only transformers; after it, the same is done with the
    repository at its new revision and an empty cache, and logits are compared to the bit.

    Args:
        folder: what `convert_checkpoint` or `save_pretrained` wrote.
        repo_id: "ORG/NAME". It is made where it does not exist.
        private: whether a new repository is private.
        revision: a branch to push to, made where it does not exist; by default main.
        create_pr: whether to open a pull request instead.
        results: lm-eval's results JSON, or a folder with such, for the card's evaluation results; of a folder of
            `finedeep eval --baseline` the comparison too. A README.md in the folder is the card as it is, without.
        say: whether to tell on stderr what is being done.

    Raises:
        ConversionError: the folder does not load, the Hub refuses, the connection breaks, or what comes back differs.
            What has arrived is not sent again by a second run.
    """
    folder = Path(folder)
    config = _check(folder)
    own_card = folder / CARD
    if results and own_card.is_file():
        raise ConversionError(
            f"{own_card} is the card as it is, and {results} would not be in it. Push without results, or move that "
            "file away to have a card made."
        )
    receipt = read_receipt(folder) if (folder / RECEIPT).is_file() else None
    scores = read_scores(Path(results)) if results else []
    comparison = read_comparison(Path(results)) if results else None
    tell = (lambda text: print(text, file=sys.stderr, flush=True)) if say else (lambda text: None)
    tell(f"Loading {folder} as anybody would ...")
    here = _fingerprint(str(folder.resolve()), None, {})
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CARD and path.name[0] != ".")
    files += sorted(folder.glob(MORE_TEMPLATES))
    api = HfApi()
    if not say:
        disable_progress_bars()
    try:
        tell(f"Uploading {len(files)} files to {repo_id} ...")
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        pushed = api.create_commit(
            repo_id,
            [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files],
            commit_message="Upload Finedeep model",
            revision=revision,
            create_pr=create_pr,
        )
        made = make_card(repo_id, pushed.oid, config, receipt, scores, comparison)
        card = own_card.read_text(encoding="utf-8") if own_card.is_file() else str(made)
        api.create_commit(
            repo_id,
            [CommitOperationAdd(CARD, card.encode())],
            commit_message="Model card, with the revision of the weights",
            revision=pushed.pr_revision or revision,
        )
    except (LocalTokenNotFoundError, HFValidationError) as error:
        raise ConversionError(f"{repo_id}: {' '.join(str(error).split())}") from error
    except HfHubHTTPError as error:
        raise ConversionError(_refusal(repo_id, error)) from error
    except Exception as error:
        if not _is_of_the_network(error):
            raise
        raise ConversionError(
            f"the connection to the Hub broke while {repo_id} was being uploaded "
            f"({type(error).__name__}: {' '.join(str(error).split())}); {AGAIN}."
        ) from error
    tell(f"Loading {repo_id} at {pushed.oid} from the Hub, into an empty cache ...")
    with tempfile.TemporaryDirectory(prefix="finedeep-push-") as cache:
        # Not HF_HOME, where `hf auth login` keeps the token.
        caches = {name: f"{cache}/{name}" for name in CACHES}
        there = _fingerprint(repo_id, pushed.oid, caches)
    if there != here:
        raise ConversionError(
            f"{repo_id} at {pushed.oid} gives other logits than {folder}. Do not use that revision; {AGAIN}."
        )
    return Push(repo_id, pushed.oid, pushed.pr_url or f"{api.endpoint}/{repo_id}")


def _check(folder: Path) -> dict:
    config = read_json(folder / "config.json", "the model's configuration")
    if config.get("model_type") != "finedeep":
        raise ConversionError(f"{folder} holds a {config.get('model_type')!r} model; a Finedeep model is wanted.")
    wanted = {reference.partition(".")[0] for reference in config.get("auto_map", {}).values()}
    missing = sorted(f"{name}.py" for name in wanted if not (folder / f"{name}.py").is_file())
    if missing or not wanted:
        raise ConversionError(
            f"{folder} lacks its code ({', '.join(missing) or 'auto_map'}); convert or save it again."
        )
    return config


def _fingerprint(name: str, revision: str | None, environment: dict[str, str]) -> str:
    """SHA-256 of the logits that a process without this project gets."""
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", FINGERPRINT, name, revision or ""],
            capture_output=True,
            text=True,
            cwd=elsewhere,
            env={**os.environ, **environment},
            check=False,
        )
    for line in done.stdout.splitlines():
        if line.startswith("FINGERPRINT "):
            return line.split()[1]
    reason = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
    raise ConversionError(f"{name} does not load on its own: {reason[0]}. Nobody else could use it.")


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    said = getattr(error, "server_message", None) or str(error).strip().splitlines()[-1]
    meaning = REASONS.get(status, AGAIN)
    return f"the Hub refused to take {repo_id} (HTTP {status}: {' '.join(str(said).split())}): {meaning}."


def _is_of_the_network(error: Exception) -> bool:
    """Whether an HTTP library raised it; which one, depends on the version of huggingface_hub."""
    cause: BaseException | None = error
    while cause is not None:
        modules = {kind.__module__.split(".")[0] for kind in type(cause).__mro__}
        if modules & {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}:
            return True
        cause = cause.__cause__
    return isinstance(error, (ConnectionError, TimeoutError))
