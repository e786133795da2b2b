"""Publish a Finedeep folder on the Hub, and prove that what is there is what was here."""

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from finedeep_files.errors import ConversionError, one_line
from finedeep_files.json_files import read_json
from finedeep_files.masking import masked
from finedeep_files.options import takes_options
from finedeep_files.publishing_options import PushOptions
from finedeep_files.shards import INDEX, WEIGHTS
from finedeep_files.versions import versions
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from ..code_files import CODE, CODE_FILES, advice, auto_map_of, copy_code, missing_code
from ..receipt import NEURONS, RECEIPT, read_receipt
from ..source import CARD, COMPANIONS, OURS, PICKLES, TOKENIZER, inside
from .card import make_card, read_comparison, read_scores
from .refusals import AGAIN, hub_errors
from .standalone import standalone_logits

# What a training leaves beside a model it saves. Some of it is pickled, its arguments with the user's token.
OF_TRAINING = (*PICKLES, "trainer_state.json")
# What another layout or an earlier tokenizer leaves in a repository, and loaders would take for this model's.
REPLACED = (WEIGHTS, INDEX, "model-*-of-*.safetensors", CODE, RECEIPT, *TOKENIZER)
CACHES = ("HF_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_XET_CACHE", "HF_MODULES_CACHE")  # the second in transformers 4


@dataclass(frozen=True)
class Push:
    """Where a model is now. `revision` is the commit that holds weights and code; the card came after it."""

    repo_id: str
    revision: str
    url: str


@takes_options(PushOptions)
def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    say: bool = True,
    **options: Any,
) -> Push:
    """Upload a converted model with a model card, and check that it comes back the same.

    Before uploading, the model is loaded in a process that has only transformers, with this package's own code, which
    the folder's has to equal; after it, the same is done with the repository at its new revision and an empty cache,
    and logits are compared to the bit.

    Args:
        folder: what `convert_checkpoint` or `save_pretrained` wrote.
        repo_id: "ORG/NAME". It is made where it does not exist.
        say: whether to tell on stderr what is being done.
        options: the fields of `PushOptions`. `private` makes a new repository private, and refuses a public one;
            `revision` is a branch, made where it does not exist; `create_pr` opens a pull request instead; `results` is
            lm-eval's results JSON, or a folder with such, for the card's evaluation results, and of a folder of
            `finedeep eval --baseline` the comparison too (a README.md in the folder is the card as it is, without);
            `trust_remote_code` runs the folder's code where it is not this package's.

    Raises:
        ConversionError: the folder does not load, holds links that lead out of it, secrets, or code that is not this
            package's; the Hub refuses, the connection breaks, or what comes back differs. What has arrived is not sent
            again by a second run.
    """
    o, folder, tell = PushOptions(**options), Path(folder), _telling(say)
    config, files = _check(folder), _files(folder)
    card = _card_maker(folder, repo_id, config, o.results)
    first_card = card(o.revision or "main")  # before anything is sent: what is wrong with it shows now
    if not o.trust_remote_code:
        _check_code(folder)
    if line := advice(folder):
        tell(line)
    api = HfApi()
    _check_repository(api, repo_id, o.private)
    tell(f"Loading {folder} without this project, as its users will ...")
    here = _logits_here(folder, o.trust_remote_code)
    if not say:
        disable_progress_bars()
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=o.private, exist_ok=True)
        _check_repository(api, repo_id, o.private)  # somebody else may have made it meanwhile
        tell(f"Uploading {len(files)} files to {repo_id} ...")
        if o.revision:
            api.create_branch(repo_id, branch=o.revision, exist_ok=True)
        additions = [CommitOperationAdd(file.relative_to(folder).as_posix(), file) for file in files]
        stale = _stale(api.list_repo_files(repo_id, revision=o.revision), {a.path_in_repo for a in additions})
        if stale:
            tell(f"Removing from {repo_id} what this model does not have: {', '.join(stale)}")
        changes = [first_card, *additions, *map(CommitOperationDelete, stale)]
        message = "Upload Finedeep model"
        pushed = api.create_commit(repo_id, changes, commit_message=message, revision=o.revision, create_pr=o.create_pr)
        if not (folder / CARD).is_file():
            message = "Model card, with the revision of the weights"
            where = pushed.pr_revision or o.revision
            api.create_commit(repo_id, [card(pushed.oid)], commit_message=message, revision=where)
    tell(f"Loading {repo_id} at {pushed.oid} from the Hub, into an empty cache ...")
    if not torch.equal(_logits_there(repo_id, pushed.oid, folder), here):
        raise ConversionError(
            f"{repo_id} at {pushed.oid} gives other logits than {folder}. Do not use that revision, and compare its "
            "files with the folder's: one that the folder lacks may be the reason."
        )
    return Push(repo_id, pushed.oid, pushed.pr_url or f"{api.endpoint}/{repo_id}")


def _stale(there: Iterable[str], sent: set[str]) -> list[str]:
    """Those of a repository's files that an earlier model left, and that loaders would take for this one's."""
    return [name for name in sorted(there) if name not in sent and any(fnmatchcase(name, like) for like in REPLACED)]


def _telling(say: bool) -> Callable[[str], None]:
    return (lambda text: print(text, file=sys.stderr, flush=True)) if say else (lambda text: None)


def _card_maker(
    folder: Path, repo_id: str, config: Mapping[str, Any], results: str | Path | None
) -> Callable[[str], CommitOperationAdd]:
    """What makes the card, given the revision that holds the weights: the folder's own where there is one."""
    own_card = folder / CARD
    if own_card.is_file():
        if results:
            raise ConversionError(
                f"{own_card} is the card as it is, and {results} would not be in it. Push without results, or move "
                "that file away to have a card made."
            )
        return lambda weights: CommitOperationAdd(CARD, own_card.read_bytes())
    receipt = read_receipt(folder) if (folder / RECEIPT).is_file() else None
    scores = read_scores(Path(results)) if results else []
    comparison = read_comparison(Path(results)) if results else None

    def card(weights: str) -> CommitOperationAdd:
        made = make_card(repo_id, weights, config, receipt, scores, comparison, checked_with=versions())
        return CommitOperationAdd(CARD, str(made).encode())

    return card


def _logits_here(folder: Path, trust_remote_code: bool) -> torch.Tensor:
    """What anybody gets of the folder: with its own code where that is trusted, else with this package's."""
    with tempfile.TemporaryDirectory(prefix="finedeep-push-") as place:
        model = folder.resolve() if trust_remote_code else _with_own_code(folder, Path(place) / "model")
        return standalone_logits(str(model), called=str(folder))


def _logits_there(repo_id: str, revision: str, folder: Path) -> torch.Tensor:
    """What anybody gets of the repository, once code and configuration are known to be those of the folder."""
    with tempfile.TemporaryDirectory(prefix="finedeep-push-") as cache:
        # Not HF_HOME, where `hf auth login` keeps the token.
        caches = {name: f"{cache}/{name}" for name in CACHES}
        _check_arrived(repo_id, revision, folder, caches["HF_HUB_CACHE"])
        return standalone_logits(repo_id, revision, caches)


def _check_repository(api: HfApi, repo_id: str, private: bool) -> None:
    """Raise `ConversionError` where the Hub refuses the token, or where a private repository exists as a public one."""
    with hub_errors(repo_id), suppress(RepositoryNotFoundError):
        public = not api.repo_info(repo_id).private
        if private and public:
            raise ConversionError(
                f"{repo_id} exists and is public; nothing was uploaded. Make it private in its settings, name another "
                "repository, or push without --private."
            )


def _check(folder: Path) -> dict:
    config = read_json(folder / "config.json", "the model's configuration")
    if config.get("model_type") != "finedeep":
        raise ConversionError(f"{folder} holds a {config.get('model_type')!r} model, not a Finedeep model.")
    if elsewhere := [reference for reference in auto_map_of(config).values() if "--" in reference]:
        raise ConversionError(
            f"{folder}/config.json takes code from another repository (auto_map: {elsewhere[0]}); a folder with its "
            f"own code can be pushed. `finedeep refresh {folder}` adds it."
        )
    missing = missing_code(folder, config)
    if missing or not auto_map_of(config):
        raise ConversionError(
            f"{folder} lacks its code ({', '.join(missing) or 'auto_map'}); `finedeep refresh {folder}` adds it."
        )
    return config


def _files(folder: Path) -> list[Path]:
    """What is uploaded, beside the card, without what a training has left.

    Raises:
        ConversionError: a link leads out of the folder, or a receipt holds a secret.
    """
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
    left_out = (CARD, *OF_TRAINING)
    return [path for path in shown if path.is_file() and not any(fnmatchcase(path.name, like) for like in left_out)]


def _check_code(folder: Path) -> None:
    """Raise `ConversionError` where the folder's code is not this package's."""
    own = {file.name: file.read_bytes() for file in CODE_FILES}
    for file in sorted(folder.glob("*.py")):
        if own.get(file.name) != file.read_bytes():
            what = "another than this version's" if file.name in own else "no file of Finedeep's"
            raise ConversionError(
                f"{file} is {what}, and loading the model would run it. Read it, and push with --trust-remote-code "
                f"(trust_remote_code=True) if you trust it, or replace it: `finedeep refresh {folder}`."
            )


def _with_own_code(folder: Path, place: Path) -> Path:
    """Make `place`, with all that is in a folder, by links, but its code, and this package's code instead."""
    place.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".py":
            (place / path.name).symlink_to(path.resolve())
    copy_code(place)
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
