"""What is timed on whole models: prefill, decoding with a cache, training steps."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from finedeep_files.timing import Work, interleaved, let_go
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from ..eval.report.cost import CACHE
from .models import CONTENDERS, SHAPES, build

DECODED = 8  # tokens, one after the other, in a timed run of decoding
CONTEXT = 128  # tokens in the cache before
CACHES = {"dynamic": (DynamicCache, {}), "static": (StaticCache, {"max_cache_len": CONTEXT + DECODED})}


@dataclass(frozen=True)
class Case:
    """One row of the results. `tokens` is the sequence; in decoding there is one new token at a time."""

    work: str
    batch: int
    tokens: int
    shape: str = "31M"
    M: int = 2
    K: int = 8
    dtype: str = "float32"
    compiled: bool = False
    cache: str = "dynamic"
    checkpointing: bool = False

    def fields(self) -> dict[str, Any]:
        """The case as the results have it."""
        return asdict(self)


CUTS = ((1, 8), (2, 8), (4, 4), (2, 32))  # M and K
EAGER = (
    Case("prefill", 1, 2048),
    Case("prefill", 8, 512),
    Case("decode", 1, 1),
    Case("decode", 8, 1),
    Case("decode", 64, 1),
    Case("train", 2, 512),
    Case("train", 2, 512, checkpointing=True),
)
COMPILED = (
    Case("prefill", 1, 2048, compiled=True),
    Case("decode", 1, 1, compiled=True, cache="static"),
    Case("train", 2, 512, compiled=True),
)


def of_every_cut(cases: tuple[Case, ...]) -> Iterator[Case]:
    """The cases with each M and K."""
    for M, K in CUTS:
        for case in cases:
            yield replace(case, M=M, K=K)


# A table for each kind of device; small models on a CPU, where a large one would take hours.
CASES: dict[str, list[Case]] = {
    "cpu": [
        *of_every_cut(EAGER),
        *of_every_cut(COMPILED),
        *(replace(case, dtype="bfloat16") for case in (*EAGER[:1], *EAGER[2:3], *EAGER[5:6], COMPILED[1])),
        replace(EAGER[2], cache="static"),
        *(replace(case, shape="11M") for case in (*EAGER[:1], *EAGER[2:3], *EAGER[5:6])),
        *(replace(case, shape="98M") for case in (*EAGER[:1], *EAGER[2:3], *EAGER[5:6])),
        *(replace(case, shape="325M") for case in (*EAGER[:1], *EAGER[2:3])),
        replace(EAGER[2], shape="1.2B", dtype="bfloat16"),
    ],
    "cuda": [
        replace(case, shape="1.2B", dtype="bfloat16")
        for case in (
            *of_every_cut((*EAGER, Case("train", 4, 2048), Case("train", 4, 2048, checkpointing=True))),
            *of_every_cut(COMPILED),
            Case("decode", 8, 1, compiled=True, cache="static"),
            Case("decode", 64, 1, compiled=True, cache="static"),
        )
    ],
}


def run_case(case: Case, seconds: float, device: str) -> dict[str, list[float]]:
    """Build the three models and time them. Returns seconds of one pass, one new token or one step, by contender."""
    names = contenders_of(case)
    return take_turns(
        case, {n: build(n, SHAPES[case.shape], case.M, case.K, case.dtype, device) for n in names}, seconds, device
    )


def take_turns(case: Case, models: dict[str, PreTrainedModel], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds of one pass, one new token or one step, by model and round. Empties `models`."""
    works = {name: WORKS[case.work](case, model, device) for name, model in models.items()}
    taken = interleaved(works, seconds, device)
    if case.work == "decode":
        taken = {name: [t / DECODED for t in times] for name, times in taken.items()}
    if case.compiled:
        torch.compiler.reset()
    works.clear()
    models.clear()
    let_go(device)
    return taken


def contenders_of(case: Case) -> tuple[str, ...]:
    """All three; but 32 experts in each sub-layer, unrolled, keep a compiler busy for longer than all else here."""
    return tuple(name for name in CONTENDERS if name != "loop" or not (case.compiled and case.K > 8))


def random_ids(case: Case, batch: int, tokens: int, device: str) -> torch.Tensor:
    """Seeded token ids (batch, tokens)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, SHAPES[case.shape].vocab_size, (batch, tokens), generator=generator).to(device)


def forward_of(case: Case, model: PreTrainedModel) -> Callable[..., Any]:
    """The model, compiled where the case says so: into one graph, or not at all."""
    if not case.compiled:
        return model
    # On a GPU a step of decoding is a matter of launches, which CUDA graphs (`reduce-overhead`) replay.
    mode = "reduce-overhead" if case.work == "decode" and model.device.type == "cuda" else None
    return torch.compile(model, fullgraph=True, mode=mode)


def warmups_of(case: Case) -> int:
    """Compiled code is compiled in the first run, and once more where a length turns out to vary."""
    return 2 if case.compiled else 1


def prefill(case: Case, model: PreTrainedModel, device: str) -> Work:
    """Logits of the last token, and a filled cache."""
    model.eval()
    ids = random_ids(case, case.batch, case.tokens, device)
    forward = forward_of(case, model)

    @torch.no_grad()
    def do(cache: DynamicCache) -> None:
        forward(input_ids=ids, **{CACHE: cache}, logits_to_keep=1)

    return Work(lambda: DynamicCache(config=model.config), do, warmups_of(case))


def decode(case: Case, model: PreTrainedModel, device: str) -> Work:
    """New tokens one at a time, after a context; which ones does not depend on the model."""
    model.eval()
    config = model.config
    kind, limit = CACHES[case.cache]
    static = kind(config=config, **limit)  # one for all runs: compiled code knows it by its address
    ids = random_ids(case, case.batch, DECODED, device)
    positions = torch.arange(CONTEXT, CONTEXT + DECODED, device=device)
    forward = forward_of(case, model)
    size = (case.batch, config.num_key_value_heads, CONTEXT, config.head_dim)
    context = torch.randn(size, device=device, dtype=model.dtype)

    def prepare() -> Cache:
        cache = static if case.cache == "static" else kind(config=config)
        cache.reset()
        for i in range(config.num_hidden_layers):
            cache.update(context, context, i)
        return cache

    @torch.no_grad()
    def do(cache: Cache) -> None:
        for i in range(DECODED):
            forward(input_ids=ids[:, i : i + 1], **{CACHE: cache}, position_ids=positions[i : i + 1].unsqueeze(0))

    return Work(prepare, do, warmups_of(case))


def train(case: Case, model: PreTrainedModel, device: str) -> Work:
    """Forward, backward, AdamW. The loss is next-token cross-entropy over all tokens."""
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = random_ids(case, case.batch, case.tokens, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = forward_of(case, model)

    def do(_: None) -> None:
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Work(lambda: None, do, warmups_of(case))


WORKS = {"prefill": prefill, "decode": decode, "train": train}
