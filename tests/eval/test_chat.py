"""Evaluation with a chat template: as the harness does it, and what cannot be."""

import json
import shutil

import lm_eval
import pytest
from finedeep.eval import EvaluationError, evaluate
from finedeep.eval.compare.scores import scores_of
from finedeep.eval.scoring.chat_template import chat_template_of, check_same_template
from finedeep_cli import main
from transformers import AutoTokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(dense, tmp_path_factory):
    """A model with a template that shows who speaks."""
    folder = shutil.copytree(dense, tmp_path_factory.mktemp("chat") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "questions"
    folder.mkdir()
    lines = [{"question": f"{i} + {i}?", "choices": ["four", "five"], "answer": i % 2} for i in range(4)]
    (folder / "one.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("multiturn", [True, False])
def test_prompts_and_scores_are_the_harnesss_own(tmp_path, chatty, questions, multiturn):
    from finedeep.eval.scoring.local_tasks import write_local_tasks

    names = write_local_tasks(questions, tmp_path / "tasks", AutoTokenizer.from_pretrained(chatty))
    prompts = {"apply_chat_template": True, "fewshot_as_multiturn": multiturn, "system_instruction": "Be short."}
    found = evaluate(chatty, names, include_path=tmp_path / "tasks", num_fewshot=1, **prompts)
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(chatty), "trust_remote_code": True},
        tasks=names,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        num_fewshot=1,
        device="cpu",
        fewshot_random_seed=1234,
        **prompts,
    )
    asked, wanted = ([sample["arguments"] for sample in each["samples"][names[0]]] for each in (found, expected))
    assert [tuple(pair) for each in asked for pair in each] == [tuple(pair) for each in wanted for pair in each]
    assert asked[0][0][0].startswith("<system>Be short.\n<user>Question: ")
    assert asked[0][0][0].count("<user>") == (2 if multiturn else 1)
    for place, score in scores_of(expected).items():
        assert scores_of(found)[place].value == pytest.approx(score.value, rel=1e-4)
    assert {name: found["config"][name] for name in prompts} == prompts


def test_the_command_writes_down_how_it_asked(tmp_path, chatty, questions, capsys):
    words = ["--local", str(questions), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["eval", str(chatty), *words, "--apply-chat-template", "--system-instruction", "Be short."]) == 0
    assert "Questions are messages by the chat template" in capsys.readouterr().out
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert (results["chat_template"], results["system_instruction"]) == (TEMPLATE, "Be short.")
    assert results["fewshot_as_multiturn"] is True


def test_one_of_several_templates(tmp_path, chatty):
    folder = shutil.copytree(chatty, tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("tools: {{ messages }}")
    assert chat_template_of(folder, True) == TEMPLATE
    assert chat_template_of(folder, "tools") == "tools: {{ messages }}"
    with pytest.raises(EvaluationError, match="has no chat template 'rag'; it has default, tools"):
        chat_template_of(folder, "rag")
    with pytest.raises(EvaluationError, match="has no chat template 'rag', only one without a name"):
        chat_template_of(chatty, "rag")


def test_templates_that_differ_or_are_not_there(tmp_path, dense, chatty):
    with pytest.raises(EvaluationError, match=r"the chat templates of .* differ"):
        check_same_template(dense, chatty, True)
    folder = shutil.copytree(dense, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(EvaluationError, match="bare has no chat template; score it without --apply-chat-template"):
        chat_template_of(folder, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "apply_chat_template=true"], "use --apply-chat-template (apply_chat_template=)"),
        (["--set", "system_instruction=x"], "use --system-instruction (system_instruction=)"),
        (["--fewshot-as-multiturn"], "for which --apply-chat-template is needed"),
    ],
)
def test_what_cannot_be_set_is_named(chatty, questions, capsys, words, said):
    assert main(["eval", str(chatty), "--local", str(questions), "--quiet", *words]) == 2
    assert said in capsys.readouterr().err
