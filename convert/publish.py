"""Publish a Finedeep folder on the Hub, and prove that what is there is what was here."""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars

from .card import make_card, read_comparison, read_scores
from .checkpoint import CODE_FILES
from .errors import ConversionError, one_line
from .masking import masked
from .receipt import NEURONS, RECEIPT, read_receipt
from .source import COMPANIONS, OURS, inside, read_json

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
    trust_remote_code: bool = False,
    say: bool = True,
) -> Push:
    """Upload a converted model with a model card, and check that it comes back the same.

    Before uploading, the model is loaded in a process that has only transformers, with this package's own code, which
    the folder's has to equal; after it, the same is done with the repository at its new revision and an empty cache,
    and logits are compared to the bit.

    Args:
        folder: what `convert_checkpoint` or `save_pretrained` wrote.
        repo_id: "ORG/NAME". It is made where it does not exist.
        private: whether the repository has to be private. A new one is made so; a public one is refused.
        revision: a branch to push to, made where it does not exist; by default main.
        create_pr: whether to open a pull request instead.
        results: lm-eval's results JSON, or a folder with such, for the card's evaluation results; of a folder of
            `finedeep eval --baseline` the comparison too. A README.md in the folder is the card as it is, without.
        trust_remote_code: whether to run the folder's code where it is not this package's.
        say: whether to tell on stderr what is being done.

    Raises:
        ConversionError: the folder does not load, holds links that lead out of it, secrets, or code that is not this
            package's; the Hub refuses, the connection breaks, or what comes back differs. What has arrived is not sent
            again by a second run.
    """
    folder = Path(folder)
    config = _check(folder)
    files = _files(folder)
    own_card = folder / CARD
    if results and own_card.is_file():
        raise ConversionError(
            f"{own_card} is the card as it is, and {results} would not be in it. Push without results, or move that "
            "file away to have a card made."
        )
    receipt = read_receipt(folder) if (folder / RECEIPT).is_file() else None
    scores = read_scores(Path(results)) if results else []
    comparison = read_comparison(Path(results)) if results else None

    def card(weights: str) -> CommitOperationAdd:
        """The card, which names the revision that holds the weights."""
        if own_card.is_file():
            return CommitOperationAdd(CARD, own_card.read_bytes())
        return CommitOperationAdd(CARD, str(make_card(repo_id, weights, config, receipt, scores, comparison)).encode())

    first_card = card(revision or "main")  # before anything is sent: what is wrong with it shows now
    if not trust_remote_code:
        _check_code(folder)
    tell = (lambda text: print(text, file=sys.stderr, flush=True)) if say else (lambda text: None)
    tell(f"Loading {folder} as anybody would ...")
    with tempfile.TemporaryDirectory(prefix="finedeep-push-") as place:
        model = folder.resolve() if trust_remote_code else _with_own_code(folder, Path(place) / "model")
        here = _fingerprint(str(model), None, {"HF_MODULES_CACHE": f"{place}/modules"}, str(folder))
    api = HfApi()
    if not say:
        disable_progress_bars()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise ConversionError(
                f"{repo_id} exists and is public; nothing was uploaded. Make it private in its settings, name another "
                "repository, or push without --private."
            )
        tell(f"Uploading {len(files)} files to {repo_id} ...")
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        pushed = api.create_commit(
            repo_id,
            [first_card, *(CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files)],
            commit_message="Upload Finedeep model",
            revision=revision,
            create_pr=create_pr,
        )
        if not own_card.is_file():
            api.create_commit(
                repo_id,
                [card(pushed.oid)],
                commit_message="Model card, with the revision of the weights",
                revision=pushed.pr_revision or revision,
            )
    except ConversionError:
        raise
    except (LocalTokenNotFoundError, HFValidationError) as error:
        raise ConversionError(f"{repo_id}: {' '.join(str(error).split())}") from error
    except HfHubHTTPError as error:
        raise ConversionError(_refusal(repo_id, error)) from error
    except Exception as error:
        if isinstance(error, ValueError) and CARD in str(error):  # before anything else was sent
            raise ConversionError(f"the Hub refused the model card: {one_line(error)}") from error
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
        _check_arrived(repo_id, pushed.oid, folder, caches["HF_HUB_CACHE"])
        there = _fingerprint(repo_id, pushed.oid, caches, repo_id)
    if there != here:
        raise ConversionError(
            f"{repo_id} at {pushed.oid} gives other logits than {folder}. Do not use that revision; {AGAIN}."
        )
    return Push(repo_id, pushed.oid, pushed.pr_url or f"{api.endpoint}/{repo_id}")


def _check(folder: Path) -> dict:
    config = read_json(folder / "config.json", "the model's configuration")
    if config.get("model_type") != "finedeep":
        raise ConversionError(f"{folder} holds a {config.get('model_type')!r} model; a Finedeep model is wanted.")
    auto_map = config.get("auto_map")
    references = [str(reference) for reference in auto_map.values()] if isinstance(auto_map, dict) else []
    if elsewhere := [reference for reference in references if "--" in reference]:
        raise ConversionError(
            f"{folder}/config.json takes code from another repository (auto_map: {elsewhere[0]}); a folder with its "
            "own code can be pushed. Save the model again."
        )
    wanted = {reference.partition(".")[0] for reference in references}
    missing = sorted(f"{name}.py" for name in wanted if not (folder / f"{name}.py").is_file())
    if missing or not wanted:
        raise ConversionError(
            f"{folder} lacks its code ({', '.join(missing) or 'auto_map'}); convert or save it again."
        )
    return config


def _files(folder: Path) -> list[Path]:
    """What is uploaded, beside the card. Raises `ConversionError` for a link out of the folder, and for a secret."""
    there = {*folder.iterdir(), *(file for pattern in COMPANIONS for file in folder.glob(pattern))}
    shown = sorted(path for path in there if path.name[0] != ".")
    for path in shown:
        inside(folder, path)
    for path in folder.glob(OURS):
        if path.suffix == ".json" and path.name != NEURONS and masked(found := read_json(path, "a receipt")) != found:
            raise ConversionError(
                f"{path} holds what looks like a password, a key or a token, and would be published. Take it out, and "
                "make it invalid if anybody else may have seen it."
            )
    return [path for path in shown if path.is_file() and path.name != CARD]


def _check_code(folder: Path) -> None:
    """Raise `ConversionError` where the folder's code is not this package's."""
    own = {file.name: file.read_bytes() for file in CODE_FILES}
    for file in sorted(folder.glob("*.py")):
        if own.get(file.name) != file.read_bytes():
            what = "another than this version's" if file.name in own else "no file of Finedeep's"
            raise ConversionError(
                f"{file} is {what}, and loading the model would run it. Read it, and push with --trust-remote-code "
                "(trust_remote_code=True) if you trust it; or convert or save the model again."
            )


def _with_own_code(folder: Path, place: Path) -> Path:
    """Make `place`, with all that is in a folder, by links, but its code, and this package's code instead."""
    place.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".py":
            (place / path.name).symlink_to(path.resolve())
    for file in CODE_FILES:
        shutil.copyfile(file, place / file.name)
    return place


def _check_arrived(repo_id: str, revision: str, folder: Path, cache: str) -> None:
    """Raise `ConversionError` where code and configuration, which are about to be run, are not those that were sent."""
    for file in (*sorted(folder.glob("*.py")), folder / "config.json"):
        try:
            there = Path(hf_hub_download(repo_id, file.name, revision=revision, cache_dir=cache)).read_bytes()
        except Exception as error:  # of the network, of the Hub, of the disk
            raise ConversionError(
                f"{repo_id} at {revision} could not be read back ({one_line(error)}); {AGAIN}."
            ) from error
        if there != file.read_bytes():
            raise ConversionError(f"{repo_id} at {revision} has another {file.name} than was sent. Do not use it.")


def _fingerprint(name: str, revision: str | None, environment: dict[str, str], called: str) -> str:
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
    raise ConversionError(f"{called} does not load on its own: {reason[0]}. Nobody else could use it.")


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
