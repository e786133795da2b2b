"""The model card of a converted model, made from its receipt with huggingface_hub's own card classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finedeep_files.conversion_options import ROUTING_FUNCTIONS
from finedeep_files.errors import ConversionError
from finedeep_files.json_files import read_json
from finedeep_files.names import COMPARISON
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..receipt import LICENCE_FIELDS, RECEIPT

PAPER = "2502.12928"
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A [Finedeep](https://arxiv.org/abs/{{ paper }}) model: the FFN of each of its {{ layers }} decoder layers is cut into
M = {{ M }} sub-layers of K = {{ K }} SwiGLU experts, {{ e }} neurons each, all of them active for every token, each
weighted by {{ gate }} of a score read from {{ scored }}.
{% if origin %}
Converted from {{ origin }}. {{ exactness }}
{% endif %}
The code travels with the weights; read it before you trust it. Pinning the revision pins both:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(
    "{{ repo_id }}", revision="{{ revision }}", trust_remote_code=True
)
tokenizer = AutoTokenizer.from_pretrained("{{ repo_id }}", revision="{{ revision }}", trust_remote_code=False)
```
{% if parameters %}
| | dense | Finedeep |
| --- | ---: | ---: |
| parameters | {{ parameters.dense }} | {{ parameters.finedeep }} |
{% endif %}
{% if comparison %}
## Beside the dense model

{{ comparison }}
{% endif %}
{% if checked_with %}Checked with {{ checked_with }}.{% endif %}
{% if receipt_file %}How it was made is in [`{{ receipt_file }}`]({{ receipt_file }}).{% endif %}
"""
SCORED = {"expert_output": "its own output", "hidden_state": "what the sub-layer reads"}
ROUTING = {"routing_function": ROUTING_FUNCTIONS, "routing_input": SCORED}  # the first is the default
SIZES = ("num_expert_sublayers", "num_experts_per_sublayer", "num_hidden_layers", "intermediate_size")


def read_scores(path: Path) -> list[EvalResult]:
    """The scores in lm-eval's results JSON, or in the newest such file below a folder.

    Of a folder of `finedeep eval --baseline`, it is the Finedeep model's scores, and those of its `comparison.json`.

    Raises:
        ConversionError: there is no such file, or it has no results.
    """
    if path.is_dir():
        if comparison := _newest_comparison(path):
            rows = read_json(comparison, "a comparison")["tasks"]
            return [_score(row["task"], row["metric"], row["model"]["value"]) for row in rows]
        found = _results_below(path)
        if not found:
            raise ConversionError(f"{path} holds no results_*.json; name the folder of `finedeep eval --output`.")
        path = found[-1]
    results = read_json(path, "lm-eval's results").get("results")
    if not isinstance(results, dict):
        raise ConversionError(f"{path} has no results; name a file that lm-eval has written.")
    return [
        _score(task, key.partition(",")[0], value, scores.get("alias", task).strip(" -"))
        for task, scores in results.items()
        for key, value in scores.items()
        if "," in key and "_stderr" not in key and isinstance(value, (int, float))
    ]


def _score(task: str, metric: str, value: float, name: str | None = None) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=task,
        dataset_name=name or task,
        metric_type=metric,
        metric_value=value,
    )


def read_comparison(path: Path) -> str | None:
    """What `finedeep eval --baseline` has found, as Markdown, if there is such in a folder."""
    if not _newest_comparison(path):
        return None
    return (path / COMPARISON).with_suffix(".md").read_text(encoding="utf-8").strip()


def _newest_comparison(folder: Path) -> Path | None:
    """A folder's comparison, unless something was scored since."""
    path = folder / COMPARISON
    if not path.is_file():
        return None
    newer = [file for file in _results_below(folder) if file.stat().st_mtime_ns > path.stat().st_mtime_ns]
    return None if newer else path


def _results_below(folder: Path) -> list[Path]:
    """lm-eval's results, the newest last."""
    return sorted(folder.rglob("results_*.json"), key=lambda file: (file.stat().st_mtime_ns, file.name))


def _exactness(receipt: Mapping[str, Any]) -> str:
    if receipt.get("exact"):
        return "Its logits equal the dense model's, to rounding."
    if receipt.get("healing"):
        return (
            "Its logits do not equal the dense model's. It was trained on to say what the dense model says; what "
            f"remains of the difference is in `{receipt['healing']}`."
        )
    if receipt.get("calibration"):
        return (
            "Its logits do not equal the dense model's. Each layer was calibrated to do what the dense one does; what "
            "remains of the difference is in the receipt."
        )
    return "Its logits do not equal the dense model's: the loss is higher until it is trained on."


def make_card(
    repo_id: str,
    revision: str,
    config: Mapping[str, Any],
    receipt: Mapping[str, Any] | None,
    scores: list[EvalResult],
    comparison: str | None = None,
    checked_with: Mapping[str, str] | None = None,
) -> ModelCard:
    """The card of the model at `revision` of `repo_id`.

    `config` is its config.json, `comparison` is Markdown, `checked_with` has the version of each package with which the
    model was loaded and run.

    Raises:
        ConversionError: config or receipt lack a field that the card tells of.
    """
    source, origin, licence, parameters = {}, "", {}, None
    if receipt is not None:
        source = _field(RECEIPT, receipt, "source", dict)
        origin = _field(RECEIPT, source, "id", str)
        licence = {k: v for k, v in _field(RECEIPT, source, "license", dict).items() if k in LICENCE_FIELDS}
        counts = _field(RECEIPT, receipt, "parameters", dict)
        parameters = {name: f"{_field(RECEIPT, counts, name, int):,}" for name in ("dense", "finedeep")}
    is_hub_id = origin.count("/") == 1 and source.get("revision")
    data = ModelCardData(
        base_model=origin if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["finedeep", "custom_code", f"arxiv:{PAPER}"],
        model_name=repo_id.rpartition("/")[2],
        eval_results=scores or None,
        **licence,
    )
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=data.model_name,
        paper=PAPER,
        **_shape(config),
        origin=f"[{origin}](https://huggingface.co/{origin})" if is_hub_id else origin,
        exactness=_exactness(receipt or {}),
        repo_id=repo_id,
        revision=revision,
        parameters=parameters,
        comparison=comparison,
        checked_with=", ".join(f"{name} {version}" for name, version in (checked_with or {}).items()),
        receipt_file=RECEIPT if receipt else None,
    )


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the card tells of the architecture."""
    M, K, layers, width = (_field("config.json", config, name, int) for name in SIZES)
    routing = {name: config.get(name, next(iter(known))) for name, known in ROUTING.items()}
    for name, value in routing.items():
        if value not in ROUTING[name]:
            raise ConversionError(f"config.json has {name}={value!r}; it must be {' or '.join(ROUTING[name])}.")
    gate, scored = (ROUTING[name][value] for name, value in routing.items())
    return {"layers": layers, "M": M, "K": K, "e": width // (M * K), "gate": gate, "scored": scored}


def _field(file: str, content: Mapping[str, Any], name: str, kind: type) -> Any:
    found = content.get(name)
    if not isinstance(found, kind) or (kind is int and found < 1):
        raise ConversionError(
            f"{file} has {name}={found!r}, of which the model card cannot be made. Convert or save the model again, or "
            "write a card of your own, as README.md in its folder."
        )
    return found
