"""Read a dense checkpoint: its config, its safetensors headers, its tensors one by one. Never its code or pickles."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finedeep_files.errors import ConversionError
from finedeep_files.inputs import check_model
from finedeep_files.json_files import read_json
from finedeep_files.loading_bars import without_loading_bars
from finedeep_files.shards import DTYPES, INDEX, WEIGHTS, Entry
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel

from ..configuration_finedeep import FinedeepConfig
from .families import check_family

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
TOKENIZER_CONFIG = "tokenizer_config.json"
MORE_TEMPLATES = "additional_chat_templates/*.jinja"  # beside the default, as transformers saves them
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    MORE_TEMPLATES,
)
# What travels with the weights, where the source has it.
COMPANIONS = (
    *TOKENIZER,
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
ADAPTER = "adapter_config.json"
CARD = "README.md"
OURS = "finedeep_*"  # receipts of a converted model
SHARD_NAME = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")
Check = Callable[[Mapping[str, Any], str], None]


@dataclass(frozen=True)
class DenseCheckpoint:
    """A dense checkpoint whose headers have been read and whose tensors have not."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Entry]

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """What transformers loads it in: the configuration's dtype, which need not be the file's.

        Raises `ConversionError` for one in which no model can be loaded.
        """
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named is None:
            return self.tensors["model.embed_tokens.weight"].dtype
        known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
        if not isinstance(named, str) or named not in known:
            raise ConversionError(
                f"{self.folder / 'config.json'} has dtype {named!r}; name one of {', '.join(known)}, or leave it out."
            )
        return known[named]

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises `ConversionError` where it holds NaN or infinity."""
        with _opened(self.tensors[name].file) as file:
            tensor = file.get_tensor(name)
        # NaN and infinity show in the extremes, which are found forty times as fast as by looking at every value.
        if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ConversionError(
                f"{self.tensors[name].file}: tensor {name} holds {bad} values that are NaN or infinite. The "
                "checkpoint is damaged: get it again or repair it."
            )
        return tensor

    def companions(self) -> Iterator[Path]:
        """Tokenizer, generation config, chat template and licence files."""
        return companions_in(self.folder)


def companions_in(folder: Path) -> Iterator[Path]:
    """What travels with a checkpoint's weights. Raises `ConversionError` for a link out of the folder."""
    for pattern in COMPANIONS:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        yield from (inside(folder, path) for path in found)


def copy_companion(file: Path, source: Path, folder: Path) -> Path:
    """Copy a file of `source` to its place in `folder`, which may be in a folder below it. Returns the copy."""
    copy = folder / file.relative_to(source)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, copy)
    return copy


def check_finedeep(config: Mapping[str, Any], where: str) -> None:
    """Raise `ConversionError` for a config of another kind of model."""
    if config.get("model_type") != FinedeepConfig.model_type:
        raise ConversionError(
            f"{where} has model_type {config.get('model_type')!r}; a Finedeep checkpoint is needed, as `finedeep "
            "convert` makes it."
        )


def open_checkpoint(source: str | Path, revision: str | None = None, check: Check = check_family) -> DenseCheckpoint:
    """Open a local folder or a Hub id. Reads the config and the safetensors headers, nothing else.

    Args:
        source: the folder or the id.
        revision: branch, tag or commit of a Hub id.
        check: raises where a configuration is of the wrong kind; of a Hub id, before its weights are fetched.

    Raises:
        ConversionError: there is no such folder or repository, or it holds no complete safetensors checkpoint.
    """
    folder = _local_folder(source, revision, check)
    check_no_adapter(folder)
    path = inside(folder, folder / "config.json")
    config = read_json(path, "the model's configuration")
    check(config, str(path))
    tensors: dict[str, Entry] = {}
    for path, listed in _weight_files(folder).items():
        with _opened(path) as file:
            names = set(file.keys())
            if listed is not None and listed != names:
                difference = ", ".join(sorted(listed ^ names)[:5])
                raise ConversionError(
                    f"{path} does not hold the tensors that {INDEX} lists for it (they differ in: {difference}). "
                    "Get the checkpoint again."
                )
            for name in names:
                part = file.get_slice(name)
                if part.get_dtype() not in DTYPES:
                    raise ConversionError(
                        f"{path}: tensor {name} has dtype {part.get_dtype()}; {', '.join(DTYPES)} can be converted. "
                        "Convert an unquantised checkpoint."
                    )
                tensors[name] = Entry(name, tuple(part.get_shape()), DTYPES[part.get_dtype()], path)
    checkpoint = DenseCheckpoint(folder, config, tensors)
    for file in checkpoint.companions():  # what is wrong with them shows now, not when all the work is done
        if file.name == TOKENIZER_CONFIG:
            read_json(file, "the tokenizer's configuration")
    return checkpoint


def _local_folder(source: str | Path, revision: str | None, check: Check) -> Path:
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(
                f"{source} is a folder here, which has no revisions; leave --revision {revision} out, or name a Hub id."
            )
        return folder
    check_model(source, ConversionError)

    def fetch(patterns: list[str], revision: str | None) -> Path:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))

    try:
        folder = fetch(["config.json", ADAPTER, CARD, INDEX, *COMPANIONS, OURS], revision)
        check_no_adapter(folder)
        check(read_json(folder / "config.json", "the model's configuration"), str(source))
        # Not "*.safetensors": some repositories have all weights in another form too. Of two layouts transformers takes
        # the one file.
        folder = fetch([WEIGHTS], folder.name)  # of the same commit
        if (folder / WEIGHTS).is_file():
            return folder
        has_index = (folder / INDEX).is_file()
        weight_map = read_json(folder / INDEX, "the list of shards").get("weight_map") if has_index else None
        shards = {str(shard) for shard in weight_map.values()} if isinstance(weight_map, dict) else set()
        return fetch(sorted(filter(SHARD_NAME.fullmatch, shards)) or [WEIGHTS], folder.name)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConversionError(
            f"{source} is not a folder here, and could not be fetched from the Hub ({reason}). "
            "Check the path or the id, and for private models log in with `hf auth login`."
        ) from error


def check_no_adapter(folder: Path) -> None:
    """Raise `ConversionError` for a folder that holds a PEFT adapter and no model."""
    if not (folder / ADAPTER).is_file() or (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    base = read_json(folder / ADAPTER, "an adapter's configuration").get("base_model_name_or_path")
    raise ConversionError(
        f"{folder} holds a PEFT adapter, not a model. Merge it into its base first (AutoPeftModelForCausalLM."
        f"from_pretrained(...).merge_and_unload().save_pretrained(...)), or take the base alone: {base or 'not named'}."
    )


def _weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensor names that an index lists for it (None for a file alone).

    Of two layouts in one folder, which a model leaves that was saved there twice, transformers takes the one file.
    """
    if (folder / WEIGHTS).is_file():
        return {inside(folder, folder / WEIGHTS): None}
    if (folder / INDEX).is_file():
        weight_map = read_json(inside(folder, folder / INDEX), "the list of shards").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{folder / INDEX} has no weight_map; get the checkpoint again.")
        files: dict[Path, set[str] | None] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
                raise ConversionError(
                    f"{folder / INDEX} names the shard {str(shard)[:100]!r}, which is not a plain file "
                    "name of a safetensors file."
                )
            files.setdefault(folder / shard, set()).add(name)
        missing = sorted(path.name for path in files if not path.is_file())
        if missing:
            raise ConversionError(
                f"{folder / INDEX} names shards that are not there: {', '.join(missing)}. "
                "Download the checkpoint completely."
            )
        return {inside(folder, path): listed for path, listed in files.items()}
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ConversionError(
            f"{folder} holds pickled weights ({', '.join(pickles[:3])}), which are never loaded because they can run "
            f"code; only {WEIGHTS} is read. Load the model with transformers where you trust it and save it again with "
            "save_pretrained."
        )
    raise ConversionError(f"{folder} has neither {WEIGHTS} nor {INDEX}; only safetensors checkpoints can be read.")


def inside(folder: Path, path: Path) -> Path:
    """`path`, unless it is a link out of the folder: what a checkpoint does not hold is not read.

    A snapshot in the Hub's cache links to the files of its repository, in the folder `blobs` beside it.
    """
    home = folder.resolve()
    allowed = [home] + ([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise ConversionError(f"{path} is a link out of its folder, to {path.resolve()}. Put the file itself there.")
    return path


def load_dense(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    """A dense model, whole, in its own dtype, by its family's class in transformers."""
    with without_loading_bars():
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            folder, config=config, dtype="auto", use_safetensors=True
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"{path} is not a complete safetensors file ({error}). Get the checkpoint again."
        ) from error
