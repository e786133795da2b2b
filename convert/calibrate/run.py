"""Calibration: after a cut with M >= 2, bring every layer as near to the dense model's as a text can teach it.

Layer by layer, in one pass. Each layer goes through stages, and keeps what is best on held-out tokens: the cut as it
is; two closed-form corrections (`closed_form`); training on the dense FFN's own work (`gradient`), for the last layer
on the dense model's next-token probabilities.
"""

import copy
import json
import time
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from finedeep_files.errors import ConversionError
from finedeep_files.hashing import sha256
from finedeep_files.options import SELF
from finedeep_files.processes import are_several, is_first_process, local_process_number, share
from finedeep_files.progress import in_words, say, seconds_for
from finedeep_files.shards import save_whole
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from ..assignment import assign
from ..cut import cast, layer_tensors, padding_rows
from ..plan import Plan
from ..source import load_dense
from .closed_form import correct
from .gradient import BATCH, Objective, error_of, fit, logit_divergence, median_error, stream_error
from .neuron_statistics import MAX_TOKENS, activity_on, nonlinearity_on
from .residual_stream import Stream, longest_usual, over_chunks, sublayers_from, through, token_weights
from .sharing import Share, everywhere
from .text import held_out, remove_sampled, sampled_by_all, text_windows

WINDOWS = "calibration-windows.safetensors"
LAYER = "calibrated-{}.safetensors"
NEURONS = "neurons"  # beside the tensors in a layer's file
TOKENS_PER_CHANNEL = 4  # at least: least squares would learn fewer by heart


@dataclass(frozen=True)
class LayerErrors:
    """How far a converted layer is from the dense one, on held-out tokens, at each stage.

    The median over tokens of |h - h*| / |h*|, with h the stream after the layer and * for the dense model. What earlier
    layers have got wrong is in it.
    """

    cut: float
    closed_form: float
    calibrated: float


class Calibration:
    """Calibrates a plan's layers. Each is kept in `folder`, so that a stopped run can continue with the next."""

    def __init__(self, plan: Plan, folder: Path, progress: bool):
        self.plan, self.folder, self.progress = plan, folder, progress
        self.device = best_device()
        self.r = plan.config.residual_multiplier

    def run(self) -> None:
        """Calibrate the layers that are not there yet.

        Raises:
            ConversionError: the text is too short, or the model's activations are not finite.
        """
        finished = share(
            all((self.folder / LAYER.format(i)).exists() for i in range(self.plan.config.num_hidden_layers))
        )
        if self.progress and not finished:
            self._announce()
        windows = self._windows()
        held = held_out(windows)
        if finished:
            return
        layers, steps = self.plan.config.num_hidden_layers, self.plan.options.calibration_steps
        self.share = Share(windows, held)
        stream = Stream(self.plan, self.share.windows, self.device)
        self.begin, self.first = time.perf_counter(), None
        bar = tqdm(total=layers * steps, desc="Calibrating", unit="step", disable=None if self.progress else True)
        with bar:
            for i in range(layers):
                self._layer(stream, i, bar)
                bar.update((i + 1) * steps - bar.n)

    def _announce(self) -> None:
        """Say what there is to do, and how long that may take."""
        o, layers = self.plan.options, self.plan.config.num_hidden_layers
        text = "sampled from the dense model" if o.calibrate == SELF else f"of {Path(o.calibrate).name}"
        seconds = seconds_for(self.operations(), self.device)
        say(
            f"Calibrating on {o.calibration_tokens:,} tokens {text}: {layers} layers, {o.calibration_steps} steps "
            f"each; at least {in_words(seconds)}, {in_words(seconds / layers)} a layer"
        )

    def operations(self) -> float:
        """Floating-point operations of the whole, those in float64 counted twice."""
        o, c = self.plan.options, self.plan.config
        d, width, layers, tokens = c.hidden_size, c.intermediate_size, c.num_hidden_layers, o.calibration_tokens
        passes = 2 * self.plan.dense_parameters * tokens * (3 if o.calibrate == SELF else 2)
        sublayer = width / c.num_expert_sublayers
        squares = d * d + d * width + c.num_expert_sublayers * (2 * d * d + sublayer * (sublayer + d))
        learnt = o.calibration_steps * BATCH
        fitted = 18 * d * width * layers + 6 * d * c.vocab_size  # of the last layer's, the head is a part
        return passes + 4 * layers * tokens * squares + learnt * fitted

    def tensors(self, i: int) -> dict[str, torch.Tensor]:
        """A calibrated layer's sub-layers, by their names in the checkpoint."""
        return {name: tensor for name, tensor in load_file(self.folder / LAYER.format(i)).items() if name != NEURONS}

    def neurons(self, i: int) -> torch.Tensor:
        """Which neurons a calibrated layer's experts have, (M, K, e)."""
        with safe_open(self.folder / LAYER.format(i), framework="pt") as file:
            return file.get_tensor(NEURONS)

    def errors(self) -> list[LayerErrors]:
        """Each layer's."""
        return [LayerErrors(**json.loads(known["errors"])) for known in self._known()]

    def _known(self) -> list[dict[str, str]]:
        found = []
        for i in range(self.plan.config.num_hidden_layers):
            with safe_open(self.folder / LAYER.format(i), framework="pt") as file:
                found.append(file.metadata())
        return found

    def record(self) -> dict[str, Any]:
        """For the receipt: on what, and how near each layer came."""
        windows = load_file(self.folder / WINDOWS)["windows"]
        with safe_open(self.folder / WINDOWS, framework="pt") as file:
            text = dict(sorted((file.metadata() or {}).items()))
        return {
            "text": text or SELF,
            "tokens": windows.numel(),
            "held_out_tokens": held_out(windows) * windows.shape[1],
            "device": self.device.type,
            "threads": sorted({int(known["threads"]) for known in self._known()}),  # a resumed run may have others
            "relative_errors": [
                {stage: float(f"{error:.3g}") for stage, error in asdict(errors).items()} for errors in self.errors()
            ],
        }

    def _windows(self) -> torch.Tensor:
        """(windows, seq) token ids; the first are held out."""
        path, o = self.folder / WINDOWS, self.plan.options
        if share(not path.exists()):
            if o.calibrate == SELF:
                model = load_dense(self.plan.dense.folder, self.plan.dense_config).to(self.device)
                if self.device.type == "cpu":
                    model.float()  # half precision is slow there
                found = sampled_by_all(model, o.calibration_tokens, o.seed, self.progress, folder=self.folder)
            else:
                found = text_windows(self.plan.dense.folder, Path(o.calibrate), self.plan.config, o.calibration_tokens)
                found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(o.seed))]
            self._check_enough(found)
            # Of the text as it was read: it may be another by the time that this is done.
            text = {} if o.calibrate == SELF else {"name": Path(o.calibrate).name, "sha256": sha256(Path(o.calibrate))}
            if is_first_process():
                save_whole({"windows": found.contiguous()}, path, text)
                remove_sampled(self.folder)
            share(None)  # it is saved
        return load_file(path)["windows"]

    def _check_enough(self, windows: torch.Tensor) -> None:
        hidden, learned = self.plan.config.hidden_size, (len(windows) - held_out(windows)) * windows.shape[1]
        if learned < TOKENS_PER_CHANNEL * hidden:
            raise ConversionError(
                f"{windows.numel()} tokens leave {learned} to learn from; with hidden size {hidden}, "
                f"at least {TOKENS_PER_CHANNEL * hidden} are needed. Name a longer text, raise calibration_tokens, or "
                f"sample a text from the dense model ('{SELF}')."
            )

    def _layer(self, stream: Stream, i: int, bar: tqdm) -> None:
        """Take the streams past a layer, having calibrated it where that was not done."""
        plan, path = self.plan, self.folder / LAYER.format(i)
        ffn = stream.attend(i)
        before = stream.dense.clone()
        over_chunks(partial(through, [ffn], r=self.r), stream.dense, self.device)
        stream.check(f"after layer {i}")
        if share(not path.exists()):
            u, dense_u, wanted = (h.flatten(0, 1) for h in (stream.finedeep, before, stream.dense))
            some = self.share.of_the_first(MAX_TOKENS)
            activity = partial(activity_on, ffn, dense_u[:some])
            nonlinearity = partial(nonlinearity_on, ffn, dense_u[:some], token_weights(wanted)[:some])
            layer = plan.layer(i, activity, nonlinearity)
            neurons = share(assign(plan.options.assignment, layer))
            tensors = {name: t for name, t in layer_tensors(plan, i, neurons).items() if ".sublayers." in name}
            padding = {name: tensors[name][rows] for name, rows in padding_rows(tensors, neurons).items()}
            for name, rows in padding_rows(tensors, neurons).items():
                tensors[name][rows] = 0  # or a fit would share a neuron's work out to its copies
            cut = sublayers_from(plan.config, tensors, i, self.device)
            sublayers, errors = self._best_stage(cut, u, dense_u, wanted, i, bar)
            for name, tensor in sublayers.state_dict().items():
                name = f"model.layers.{i}.sublayers.{name}"
                tensors[name] = cast(name, tensor.cpu(), tensors[name].dtype)
            for name, rows in padding_rows(tensors, neurons).items():
                tensors[name][rows] = padding[name]
            known = {"errors": json.dumps(asdict(errors)), "threads": str(torch.get_num_threads())}
            if is_first_process():
                save_whole({NEURONS: neurons, **tensors}, path, known)
            share(None)  # it is saved
            if self.progress:
                stages = ", ".join(f"{stage.replace('_', ' ')} {error:.3f}" for stage, error in asdict(errors).items())
                self.first = i if self.first is None else self.first
                done, rest = i + 1 - self.first, plan.config.num_hidden_layers - i - 1
                left = in_words((time.perf_counter() - self.begin) / done * rest)
                say(f"layer {i}: error relative to the stream, median token: {stages}; {left} left")
        sublayers = sublayers_from(plan.config, self.tensors(i), i, self.device)  # rounded as they will be written
        over_chunks(partial(through, sublayers, r=self.r), stream.finedeep, self.device)

    def _best_stage(
        self,
        cut: nn.ModuleList,
        u: torch.Tensor,
        dense_u: torch.Tensor,
        wanted: torch.Tensor,
        i: int,
        bar: tqdm,
    ) -> tuple[nn.ModuleList, LayerErrors]:
        """The best stage, and the error of each. Args: u, dense_u and wanted (tokens, hidden), the streams."""
        held = self.share.held
        if everywhere(torch.equal(wanted, dense_u), self.device):  # an FFN that does nothing
            return cut, LayerErrors(*[median_error(cut, u[:held], wanted[:held], self.r)] * 3)
        objective = (
            self._divergence if i == self.plan.config.num_hidden_layers - 1 else stream_error(longest_usual(wanted))
        )

        def error(sublayers: nn.ModuleList) -> float:
            return error_of(sublayers, u[:held], wanted[:held], self.r, objective)

        corrected = copy.deepcopy(cut)
        correct(corrected, u, dense_u, wanted, self.r, held)
        calibrated = copy.deepcopy(min((cut, corrected), key=error))
        if steps := self.plan.options.calibration_steps:
            generator = torch.Generator().manual_seed(self.plan.options.seed)
            for lowest in fit(
                calibrated, u, wanted, self.r, objective, held=held, steps=steps, generator=generator, share=self.share
            ):
                bar.update()
                bar.set_postfix_str(f"layer {i}, held out {lowest:.4f}", refresh=False)
        stages = (cut, corrected, calibrated)
        return calibrated, LayerErrors(*(median_error(stage, u[:held], wanted[:held], self.r) for stage in stages))

    @cached_property
    def _divergence(self) -> Objective:
        dense = self.plan.dense
        head = dense.load("model.embed_tokens.weight" if self.plan.config.tie_word_embeddings else "lm_head.weight")
        norm = dense.load("model.norm.weight").float().to(self.device)
        return logit_divergence(norm, head.float().to(self.device), self.plan.config)


def best_device() -> torch.device:
    """The accelerator where there is one that can compute in float64."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type == "mps":
        return torch.device("cpu")
    return torch.device(device.type, local_process_number()) if are_several() else device
