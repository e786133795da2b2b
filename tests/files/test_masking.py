"""Secrets: what is masked, what is not, and that no file that a command leaves holds one."""

import json
import sys

import pytest
from conftest import make_dense
from finedeep.convert import convert_checkpoint
from finedeep.convert.heal.run import HEALING, heal
from finedeep.convert.heal.trainer import HealingTrainer
from finedeep.convert.receipt import RECEIPT
from finedeep.eval import evaluation
from finedeep_cli import main
from finedeep_files.hashing import sha256
from finedeep_files.masking import MASK, masked, names_a_secret
from hypothesis import given, settings
from hypothesis import strategies as st

# Built here, so that nobody's scanner takes this file for a leak.
LOOKING_LIKE_ONE = [
    "hf_" + "aB3" * 11,
    "sk-" + "proj-aB3_" * 4,
    "ghp_" + "aB3" * 12,
    "github_pat_" + "aB3_" * 12,
    "AKIA" + "ABCD2345" * 2,
    "Bearer " + "aB3.-_" * 4,
    "eyJ" + "aB3" * 6 + ".aB3_.aB3-",
]


@pytest.mark.parametrize(
    "name",
    "token hub_token push_to_hub_token use_auth_token HF_TOKEN password db.password secret client_secret apiKey "
    "api_key OPENAI_API_KEY credentials aws_access_key_id AWS_SECRET_ACCESS_KEY private_key passphrase".split(),
)
def test_names_of_secrets(name):
    assert masked({name: "anything"}) == {name: MASK}
    assert masked({"a": [{name: ["x", 3]}]}) == {"a": [{name: MASK}]}
    assert masked({name: 12345}) == {name: MASK}
    assert masked({name: None, "x": {name: True}}) == {name: None, "x": {name: True}}
    assert masked(f"pretrained=org/name,{name}=anything") == f"pretrained=org/name,{name}={MASK}"


@pytest.mark.parametrize(
    "name",
    "tokens calibration_tokens tokens_seen max_new_tokens bos_token eos_token pad_token unk_token tokenizer_pad_token "
    "eos_token_id add_bos_token_id tokenizer monkey key keys max_gen_toks token_gates next_token flops_per_token "
    "held_out_nats_per_token".split(),
)
def test_names_of_other_things(name):
    assert not names_a_secret(name)
    assert masked({name: "anything"}) == {name: "anything"}


@pytest.mark.parametrize("secret", LOOKING_LIKE_ONE)
def test_values_that_look_like_secrets(secret):
    found = masked({"run_name": f"of {secret}, today", "of": [secret], "more": ({"x": secret},)})
    assert found["run_name"] == f"of {MASK}, today"
    assert secret not in json.dumps(found)


@pytest.mark.parametrize(
    "value",
    ["hf-internal-testing/tiny", "org/task-by-task", "./sk-learn", "hf_hub", "a=1,b=2", "<pad>", 1.5, 7],
)
def test_values_that_do_not(value):
    assert masked({"pretrained": value}) == {"pretrained": value}


def test_a_password_in_an_address():
    assert masked("https://me:pass@host/path") == f"https://{MASK}@host/path"


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.sampled_from(LOOKING_LIKE_ONE) | st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_no_secret_is_left_wherever_it_is(value):
    text = json.dumps(masked(value))
    assert not [secret for secret in LOOKING_LIKE_ONE if secret in text]
    assert masked(masked(value)) == masked(value)


def files_with(folder, word):
    return [path for path in folder.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


SECRET = LOOKING_LIKE_ONE[0]


def test_healing_writes_down_no_secret_and_no_path(tmp_path, dense, monkeypatch):
    """Not in its checkpoints either, into which `Trainer` pickles its arguments."""
    place = tmp_path / "somewhere"
    make_dense(place / "teacher")
    convert_checkpoint(dense, place / "cut", num_expert_sublayers=2, num_experts_per_sublayer=4, progress=False)
    (place / "text.txt").write_text("There was a text. " * 400)
    training = {"hub_token": SECRET, "run_name": f"by {SECRET}", "save_steps": 1}
    in_checkpoints = []
    usual = HealingTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        in_checkpoints.append(files_with(place, SECRET))
        return usual(self, *args, **kwargs)

    monkeypatch.setattr(HealingTrainer, "evaluate", evaluate)
    options = {"data": str(place / "text.txt"), "teacher": str(place / "teacher"), "training": training}
    quick = {"tokens": 2048, "context": 32, "steps": 2, "batch_size": 4, "progress": False}
    heal(place / "cut", place / "out", **options, **quick)
    assert in_checkpoints == [[], []]  # at the beginning, and at the end when checkpoints are there
    receipt = json.loads((place / "out" / HEALING).read_text())
    assert receipt["options"]["training"] == {"hub_token": MASK, "run_name": f"by {MASK}", "save_steps": 1}
    assert (receipt["options"]["data"], receipt["data_sha256"]) == ("text.txt", sha256(place / "text.txt"))
    assert receipt["options"]["teacher"] == "teacher"
    assert receipt["teacher_sha256"] == {"model.safetensors": sha256(place / "teacher/model.safetensors")}
    assert not files_with(place / "out", "somewhere")


@pytest.mark.parametrize("option", ["--calibrate", "--assignment-text"])
def test_a_conversions_receipt_names_its_text_and_says_no_path(tmp_path, dense, option):
    text = tmp_path / "somewhere/text.txt"
    text.parent.mkdir()
    text.write_text("There was a text. " * 800)
    words = [
        "--sublayers",
        "2",
        option,
        str(text),
        "--quiet",
    ]
    calibrated = ["--calibration-steps", "1", "--calibration-tokens", "4096"]
    words += ["--assignment", "activity"] if option == "--assignment-text" else calibrated
    assert main(["convert", str(dense), str(tmp_path / "out"), *words]) == 0
    receipt = json.loads((tmp_path / "out" / RECEIPT).read_text())
    field = {"--calibrate": "calibrate", "--assignment-text": "text"}[option]
    assert receipt["options"][field] == "text.txt"
    record = receipt["calibration"]["text"] if field == "calibrate" else receipt["assignment_text"]
    assert record == {"name": "text.txt", "sha256": sha256(text)}
    assert not files_with(tmp_path / "out", "somewhere")


def test_an_evaluation_writes_down_no_secret(tmp_path, dense, converted, monkeypatch):
    """Results, comparison, page, and while it is at work the plan of the run."""
    questions = tmp_path / "questions"
    questions.mkdir()
    line = json.dumps({"question": "2 + 2?", "choices": ["four", "five"], "answer": 0})
    (questions / "one.jsonl").write_text(f"{line}\n" * 2)
    out, left = tmp_path / "results", []

    def conclude(*arguments, conclude=evaluation._conclude):
        assert (tmp_path / ".results.unfinished/plan.json").is_file()
        left.append(files_with(tmp_path, SECRET))
        return conclude(*arguments)

    monkeypatch.setattr(evaluation, "_conclude", conclude)
    words = ["--local", str(questions), "--set", f"token={SECRET}", "--set", f"cache_dir={tmp_path}/{SECRET}"]
    words += ["--baseline", str(dense), "--output", str(out), "--answers", str(tmp_path / "answers"), "--quiet"]
    monkeypatch.setattr(sys, "argv", ["finedeep", "eval", str(converted), *words])  # which the page shows
    assert main(sys.argv[1:]) == 0
    assert left == [[]]
    assert not files_with(tmp_path, SECRET)
    assert json.loads((out / "comparison.json").read_text())["options"]["model_args"]["token"] == MASK
    assert f"token={MASK}" in (out / "report.html").read_text()
