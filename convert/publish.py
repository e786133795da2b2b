"""Publish a Finedeep folder on the Hub, and prove that what is there is what was here."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import disable_progress_bars

from .card import CARD, make_card, read_comparison, read_scores
from .code_files import advice, auto_map_of, missing_code
from .errors import ConversionError
from .hub import AGAIN, hub_errors
from .receipt import RECEIPT, read_receipt, versions
from .source import read_json
from .standalone import standalone_logits

CACHES = ("HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE")  # the second in transformers 4


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
    if line := advice(folder):
        tell(line)
    tell(f"Loading {folder} as anybody would ...")
    here = standalone_logits(str(folder.resolve()))
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CARD and path.name[0] != ".")
    api = HfApi()
    if not say:
        disable_progress_bars()
    tell(f"Uploading {len(files)} files to {repo_id} ...")
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        pushed = api.create_commit(
            repo_id,
            [CommitOperationAdd(file.name, file) for file in files],
            commit_message="Upload Finedeep model",
            revision=revision,
            create_pr=create_pr,
        )
        made = make_card(repo_id, pushed.oid, config, receipt, scores, comparison, checked_with=versions())
        card = own_card.read_text(encoding="utf-8") if own_card.is_file() else str(made)
        api.create_commit(
            repo_id,
            [CommitOperationAdd(CARD, card.encode())],
            commit_message="Model card, with the revision of the weights",
            revision=pushed.pr_revision or revision,
        )
    tell(f"Loading {repo_id} at {pushed.oid} from the Hub, into an empty cache ...")
    with tempfile.TemporaryDirectory(prefix="finedeep-push-") as cache:
        # Not HF_HOME, where `hf auth login` keeps the token.
        caches = {name: f"{cache}/{name}" for name in CACHES}
        there = standalone_logits(repo_id, pushed.oid, caches)
    if not torch.equal(there, here):
        raise ConversionError(
            f"{repo_id} at {pushed.oid} gives other logits than {folder}. Do not use that revision; {AGAIN}."
        )
    return Push(repo_id, pushed.oid, pushed.pr_url or f"{api.endpoint}/{repo_id}")


def _check(folder: Path) -> dict:
    config = read_json(folder / "config.json", "the model's configuration")
    if config.get("model_type") != "finedeep":
        raise ConversionError(f"{folder} holds a {config.get('model_type')!r} model; a Finedeep model is wanted.")
    missing = missing_code(folder, config)
    if missing or not auto_map_of(config):
        raise ConversionError(
            f"{folder} lacks its code ({', '.join(missing) or 'auto_map'}); `finedeep refresh {folder}` adds it."
        )
    return config
