"""More of what Llama's own tests ask of Llama, asked of Llama and of its exact Finedeep form side by side."""

import pytest
import torch
import transformers
from conftest import TINY
from test_generation import SHAPE, pair, prompts, randomised  # noqa: F401  (fixtures)
from transformers import GenerationConfig

NEW = 6


def with_everything(model, ids, mask, **options):
    torch.manual_seed(0)
    settings = GenerationConfig(
        max_new_tokens=NEW,
        pad_token_id=TINY["pad_token_id"],
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
        **options,
    )
    model.set_attn_implementation("eager")
    return model.generate(ids, attention_mask=mask, generation_config=settings)


def same(found, expected):
    """Tuples of tuples of tensors, of the same shapes and nearly the same values."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        return
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 3}, {"num_beams": 3, "do_sample": True}, {"use_cache": False}],
    ids=str,
)
def test_generation_returns_the_same_scores_attentions_and_hidden_states(pair, prompts, options):  # noqa: F811
    ids, mask = prompts
    expected, found = (with_everything(model, ids, mask, **options) for model in pair)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits", "attentions", "hidden_states"):
        same(getattr(found, name), getattr(expected, name))


def test_generation_goes_on_from_a_cache(pair, prompts):  # noqa: F811
    ids, mask = prompts[0][:1], prompts[1][:1]
    for model in pair:
        whole = with_everything(model, ids, mask).sequences
        with torch.no_grad():
            cache = model(ids[:, :-3], use_cache=True).past_key_values
        rest = GenerationConfig(max_new_tokens=NEW, pad_token_id=TINY["pad_token_id"], eos_token_id=None)
        assert torch.equal(model.generate(ids, past_key_values=cache, generation_config=rest), whole)


@torch.no_grad()
def test_logits_of_some_positions(pair, prompts):  # noqa: F811
    """Of the last ones, the same of all sequences, others of each, or as a mask: against picking by hand."""
    ids = prompts[0][:2, :6]
    model = pair[1]
    whole = model(ids).logits
    some = torch.tensor([[4, 0], [1, 5]])
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2] = mask[1, 3] = mask[1, 5] = True
    wanted = {
        "last": (2, whole[:, 4:]),
        "all": (0, whole),
        "the same": (torch.tensor([3, 1]), torch.stack([whole[:, 3], whole[:, 1]], 1)),
        "others": (some, torch.stack([whole[0, [4, 0]], whole[1, [1, 5]]])),
        "mask": (mask, torch.stack([whole[0, 2], whole[1, 3], whole[1, 5]])),
    }
    for positions, expected in wanted.values():
        torch.testing.assert_close(model(ids, logits_to_keep=positions).logits, expected)


def test_a_mask_of_four_dimensions(pair, prompts):  # noqa: F811
    """Two texts packed in one row, kept apart by the mask and by positions, as each alone."""
    a, b = prompts[0][:1, :20], prompts[0][:1, 20:]
    packed = torch.cat([a, b], dim=1)
    lengths = (a.shape[1], b.shape[1])
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths))
    mask = torch.where(blocks.bool(), 0.0, torch.finfo(torch.float32).min)[None, None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    for model in pair:
        with torch.no_grad():
            found = model(packed, attention_mask=mask, position_ids=positions).logits
            alone = torch.cat([model(a).logits, model(b).logits], dim=1)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


PROBLEMS = {
    "regression": (1, lambda n: torch.arange(n) / n),
    "single_label_classification": (3, lambda n: torch.arange(n) % 3),
    "multi_label_classification": (3, lambda n: torch.eye(3).repeat(n, 1)[:n]),
}


def head_pair(head, **fields):
    """A Llama with this head and its exact Finedeep form: the trunk's weights as in `pair`, the head's the same."""
    import finedeep

    shape = {**SHAPE, **fields}
    experts = {"num_expert_sublayers": 1, "num_experts_per_sublayer": 4}
    dense = randomised(getattr(transformers, f"Llama{head}")(transformers.LlamaConfig(**shape)))
    model = getattr(finedeep, f"Finedeep{head}")(finedeep.FinedeepConfig(**shape, **experts)).eval()
    # transformers builds Llama's question answering on a trunk of another name
    state = {name.replace("transformer.", "model."): tensor for name, tensor in dense.state_dict().items()}
    for name, parameter in model.state_dict().items():
        source = name.replace("sublayers.0.norm", "post_attention_layernorm").replace("sublayers.0.", "mlp.")
        parameter.copy_(state[source] if source in state else torch.zeros_like(parameter))
    return dense, model


@pytest.mark.parametrize("problem", PROBLEMS)
@torch.no_grad()
def test_classification_of_sequences(problem, prompts):  # noqa: F811
    ids, mask = prompts
    num_labels, labels = PROBLEMS[problem]
    outputs = [
        model(ids, attention_mask=mask, labels=labels(len(ids)))
        for model in head_pair("ForSequenceClassification", num_labels=num_labels, problem_type=problem)
    ]
    same(outputs[1].logits, outputs[0].logits)
    same(outputs[1].loss, outputs[0].loss)


@torch.no_grad()
def test_classification_of_tokens_and_answers(prompts):  # noqa: F811
    ids, mask = prompts
    expected, found = (
        model(ids, attention_mask=mask, labels=ids % 3) for model in head_pair("ForTokenClassification", num_labels=3)
    )
    same((found.loss, found.logits), (expected.loss, expected.logits))
    places = {"start_positions": torch.tensor([3, 9]), "end_positions": torch.tensor([5, 20])}
    expected, found = (model(ids, attention_mask=mask, **places) for model in head_pair("ForQuestionAnswering"))
    same(
        (found.loss, found.start_logits, found.end_logits), (expected.loss, expected.start_logits, expected.end_logits)
    )


@pytest.mark.parametrize(("tokens", "recorded"), [(1, False), (5, False), (45, False), (45, True)])
def test_logits_are_the_dense_models_to_the_bit(pair, prompts, tokens, recorded):  # noqa: F811
    """On a CPU in float32, by one product: what is computed in fewer passes is computed in Llama's order."""
    ids = prompts[0][:1, :tokens]
    with torch.set_grad_enabled(recorded):
        expected, found = (model(ids).logits for model in pair)
    assert torch.equal(found, expected)
