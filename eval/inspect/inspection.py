"""How sparse a model is, and what its gates do, on a text: dense or Finedeep."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from finedeep_files.inspection_options import InspectionOptions
from finedeep_files.loading_bars import without_loading_bars
from finedeep_files.options import takes_options
from finedeep_files.text_files import JSON_LINES
from finedeep_files.tokenizers import load_tokenizer
from finedeep_files.whole_file import write_whole
from finedeep_files.working_folder import WorkingFolder
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..compare.table import aligned_markdown
from ..errors import EvaluationError, cannot_load
from ..output import INSPECTED, INSPECTION
from .recorder import EDGES, THRESHOLDS, Place, places_of, rates, watch

WINDOW = 512  # tokens, or as many as the model has positions for
BATCH = 4  # windows
PIECE = 2**16  # characters that are tokenised at a time
SHOWN = 40  # tokens whose gates are kept one by one


@takes_options(InspectionOptions)
def inspect(
    model: str | Path,
    text: str | Path,
    *,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Send a text through a model and sum up what its FFNs do.

    Windows of 512 tokens, each with what the tokenizer puts before a text. No code out of the model's folder is run.

    Args:
        model: a local folder or a Hub id.
        text: a UTF-8 text file. It is read as it is needed.
        progress: whether to show a bar on stderr.
        options: the fields of `InspectionOptions`: `tokens` of the text at most, `device` and `dtype`.

    Returns:
        JSON-able: `loss` in nats per token, `nsar` overall by threshold, `histogram` of act(gate) with its `edges`,
        `layers` with the NSAR of each, `places` with everything by sub-layer (see `recorder.Place`), and for a Finedeep
        model `tokens` and `token_gates` (layer, M, K) of the text's beginning.

    Raises:
        EvaluationError: the model or text cannot be read, or the model has no FFNs that are known here, or is broken.
    """
    o = InspectionOptions(**options)
    check_text(Path(text))
    loaded, tokenizer = load(model, o.device, o.dtype)
    window = min(WINDOW, loaded.config.max_position_embeddings, max(2, o.tokens))
    places = places_of(loaded)
    handles = [handle for place, ffn in places for handle in watch(place, ffn)]
    finedeep = places[0][0].K > 0
    loss, seen, beginning = 0.0, 0, {}
    try:
        with torch.inference_mode(), tqdm(total=o.tokens, unit="tok", disable=None if progress else True) as bar:
            for batch in batches(tokenizer, Path(text), window, o.tokens):
                ids = torch.tensor(batch, device=loaded.device)
                more = {"output_router_logits": True} if finedeep and not beginning else {}
                out = loaded(input_ids=ids, labels=ids, use_cache=False, **more)
                if more:
                    beginning = beginning_of(tokenizer, batch[0], out.router_logits)
                loss += float(out.loss) * (ids.numel() - len(ids))
                seen += ids.numel() - len(ids)
                bar.update(ids.numel())
    finally:
        for handle in handles:
            handle.remove()
    if not math.isfinite(loss):
        raise EvaluationError(
            f"{model} has a loss of {loss} in {loaded.dtype}: its weights are damaged, or too large for this "
            "dtype (--dtype float32 shows which)."
        )
    return {
        "model": str(model),
        "parameters": loaded.num_parameters(),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "window": window,
        "predicted_tokens": seen,
        "loss": loss / seen,
        **summary_of([place for place, _ in places]),
        **beginning,
    }


def load(model: str | Path, device: str | None, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer. Raises `EvaluationError` where one cannot be loaded."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = load_tokenizer(model)
        with without_loading_bars():
            loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, trust_remote_code=False)
            loaded = loaded.to(device).eval()
        if loaded.device.type == "cuda":
            torch.cuda.set_device(loaded.device)  # of which memory and time are asked
    except Exception as error:  # which it is, depends on versions
        raise cannot_load(model, error) from error
    return loaded, tokenizer


def batches(tokenizer: PreTrainedTokenizerBase, text: Path, window: int, tokens: int) -> Iterator[list[list[int]]]:
    """Lists of windows of one length. The last, shorter window comes alone, and only if there is no other."""
    before = tokenizer("")["input_ids"]
    after = tokenizer.eos_token_id
    before = [i for i in before if i != after]  # what stands before a text, not after it
    batch, buffer, given = [], [], 0
    for ids in pieces(tokenizer, text):
        buffer += ids
        while len(buffer) >= window - len(before):
            batch.append(before + buffer[: window - len(before)])
            del buffer[: window - len(before)]
            given += window
            last = given + window > tokens
            if len(batch) == BATCH or last:
                yield batch
                batch = []
            if last:
                return
    if batch:
        yield batch
    elif not given:
        if len(before) + len(buffer) < 2:
            raise EvaluationError(f"{text} has {len(buffer)} tokens; it needs at least 2.")
        yield [before + buffer]


def check_text(text: Path) -> None:
    """Raise `EvaluationError` unless the whole text can be read, is no JSON, and there is something in it."""
    if text.suffix in (".json", *JSON_LINES):
        raise EvaluationError(f"{text} is JSON, whose syntax would be measured as text; name a plain text file.")
    try:
        with text.open(encoding="utf-8") as file:
            found = False
            while piece := file.read(PIECE):
                found = found or bool(piece.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{text} cannot be read as UTF-8 text ({error}).") from error
    if not found:
        raise EvaluationError(f"{text} is empty; name a text like those that the model is for.")


def pieces(tokenizer: PreTrainedTokenizerBase, text: Path) -> Iterator[list[int]]:
    """The text's tokens, piece by piece, cut at line ends where there are."""
    rest = ""
    with text.open(encoding="utf-8") as file:
        while piece := file.read(PIECE):
            whole, line_end, begun = (rest + piece).rpartition("\n")
            piece, rest = (whole + line_end, begun) if line_end else (begun, "")
            yield tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    if rest:
        yield tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]


def beginning_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], gates: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """The first tokens and their gates: a list for each token of (layer, M, K)."""
    by_token = torch.stack([layer[0, :SHOWN] for layer in gates], dim=1)
    words = [token.replace("Ġ", " ").replace("▁", " ") for token in tokenizer.convert_ids_to_tokens(ids[:SHOWN])]
    return {"tokens": words, "token_gates": by_token.float().tolist()}


def summary_of(places: list[Place]) -> dict[str, Any]:
    """NSAR and histogram of the whole, by layer and by place."""

    def together(some: list[Place]) -> dict[str, float]:
        return rates(sum(p.sums["above"] for p in some), sum(p.values for p in some))

    layers = sorted({place.layer for place in places})
    return {
        "thresholds": list(THRESHOLDS),
        "nsar": together(places),
        "edges": EDGES,
        "histogram": sum(place.sums["histogram"] for place in places).long().tolist(),
        "layers": [{"layer": i, "nsar": together([p for p in places if p.layer == i])} for i in layers],
        "places": [place.summary() for place in places],
    }


def table_of(inspections: Mapping[str, Mapping[str, Any]]) -> str:
    """Models side by side as a Markdown table."""
    return aligned_markdown(["", *inspections], rows_of(inspections), 1)


# What the table shows of a model's places, and in which form. To add a statistic, add its row here.
OF_PLACES: dict[str, tuple[Callable[[list[Mapping[str, Any]]], float], str]] = {
    "effective rank of an FFN's output, mean": (lambda places: mean(p["effective_rank"] for p in places), ".1f"),
}
# Of what their gates do, where there are any.
OF_GATES: dict[str, Callable[[list[Mapping[str, Any]]], float | None]] = {
    "gates, mean": lambda g: mean(map(mean, (p["mean"] for p in g))),
    "gates, spread over tokens": lambda g: mean(map(mean, (p["std"] for p in g))),
    "gates near 0 (below 5 % of c, of softmax c/K)": lambda g: mean(map(mean, (p["near_0"] for p in g))),
    "gates near c (above 95 % of c)": lambda g: mean(map(mean, (p["near_1"] for p in g))),
    "entropy of gates, 1 = all alike": lambda g: mean(p["entropy"] for p in g),
    "correlation between experts, mean size": lambda g: mean(p["mean_absolute_correlation"] for p in g),
    "experts that never matter": lambda g: float(sum(p["never_matters"] for p in g)),
}


def rows_of(inspections: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Models side by side: loss, non-sparse activation rates (NSAR), and what else there is of places and gates."""
    models = list(inspections.values())
    rows = [
        ["parameters", *(f"{found['parameters']:,}" for found in models)],
        ["loss, nats per token", *(f"{found['loss']:.4f}" for found in models)],
        *([f"NSAR at {t}", *(f"{found['nsar'][str(t)]:.2%}" for found in models)] for t in THRESHOLDS),
        *([label, *(format(of(m["places"]), form) for m in models)] for label, (of, form) in OF_PLACES.items()),
    ]
    gated = [[p["gates"] for p in found["places"] if "gates" in p] for found in models]
    for label, figure in OF_GATES.items():
        cells = [figure(gates) if gates else None for gates in gated]
        if any(value is not None for value in cells):  # constant gates have no correlation
            rows.append([label, *("" if value is None else f"{value:.3g}" for value in cells)])
    return rows


def prepare(folder: str | Path, overwrite: bool = False) -> None:
    """Raise `EvaluationError` where `save` could not write into a folder, or nothing can be drawn."""
    WorkingFolder(Path(folder), EvaluationError, overwrite=overwrite).check()
    _plots()


def save(inspections: Mapping[str, Mapping[str, Any]], folder: str | Path, overwrite: bool = False) -> list[Path]:
    """Write `inspection.json`, then the figures, into a folder that is made. Returns their paths.

    Args:
        inspections: what `inspect` has returned, by name.
        folder: the folder to make.
        overwrite: whether to replace the files of an inspection that is there, as `finedeep_results.json` lists them.

    Raises:
        EvaluationError: the folder cannot be made; or nothing can be drawn, but `inspection.json` is written.
    """
    names, missing = [INSPECTION], None
    with WorkingFolder(Path(folder), EvaluationError, overwrite=overwrite).begun(INSPECTED, {}) as made:
        write_whole(made / INSPECTION, json.dumps(inspections, indent=1))
        try:
            plots = _plots()
        except EvaluationError as error:
            missing = error
        else:
            names += [path.name for path in plots.save(plots.figures_of(inspections), made)]
    if missing:
        raise missing
    return [Path(folder) / name for name in names]


def _plots() -> ModuleType:
    """The module that draws, and with it all that it imports."""
    try:
        from . import plots
    except ImportError as error:
        raise EvaluationError(
            f"figures cannot be drawn ({error}). Install what that wants with: pip install 'finedeep[plots]'"
        ) from error
    return plots


def mean(values: Iterator[float | None]) -> float | None:
    """The mean of those that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
