"""Publishing over real HTTP, with the real client, to a Hub on loopback."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import yaml
from conftest import make_dense
from finedeep.convert import ConversionError, convert_checkpoint
from finedeep.convert.hub.card import make_card, read_scores
from finedeep.convert.hub.push import _files, _stale, push_folder
from finedeep_cli import main
from forked import run_command
from hub_server import TOKEN, running_hub


@pytest.fixture(scope="module")
def finedeep_folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("publish")
    make_dense(place / "dense")
    (place / "dense/README.md").write_text("---\nlicense: other\nlicense_name: kind\n---\nA card.\n")
    (place / "dense/additional_chat_templates").mkdir()
    (place / "dense/additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    convert_checkpoint(place / "dense", place / "out", max_shard_size="60KB", progress=False)
    return place / "out"


def push(folder, environment, *options):
    """`finedeep push` in a process of its own, with the settings of huggingface_hub that the environment has."""
    (done,) = run_command(["push", folder, "org/model", *options], environment)
    return done


def metadata(card):
    return yaml.safe_load(card.decode().split("---")[1])


def test_push_and_load_at_the_revision_that_the_card_names(tmp_path, finedeep_folder):
    results = {"results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1}}}
    (tmp_path / "results_1.json").write_text(json.dumps(results))
    # As `hf auth login` leaves it.
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text(TOKEN)
    with running_hub() as (hub, environment):
        environment |= {"HF_TOKEN": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "cache")}
        done = push(finedeep_folder, environment, "--private", "--results", str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == f"{hub.url}/org/model"
        files = hub.repositories["org/model"][-1]
        revision = re.search(r"revision ([0-9a-f]{40})", done.stdout).group(1)
        card = files["README.md"].decode()
        assert f'revision="{revision}"' in card
        assert any(path.startswith(f"/org/model/resolve/{revision}/model-") for _, path in hub.requests)
    assert hub.private["org/model"]
    assert not (tmp_path / "cache").exists()  # what was pushed has come back into an empty one
    assert {"finedeep_conversion.json", "modeling_finedeep.py", "tokenizer.json"} <= set(files)
    assert files["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
    assert not any(name.startswith(".") for name in files)
    found = metadata(files["README.md"])
    assert found["library_name"] == "transformers"
    assert found["pipeline_tag"] == "text-generation"
    assert (found["license"], found["license_name"]) == ("other", "kind")
    assert "arxiv:2502.12928" in found["tags"]
    result = found["model-index"][0]["results"][0]
    assert (result["dataset"]["type"], result["metrics"][0]["type"], result["metrics"][0]["value"]) == (
        "arc_easy", "acc", 0.5,
    )  # fmt: skip


def test_what_is_removed_from_a_repository():
    there = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "merges.txt"]
    others = [
        "notes.txt",
        "LICENSE",
        ".gitattributes",
        "README.md",
        "adapters/model.safetensors",
        "consolidated.safetensors",
    ]
    assert _stale([*there, *others, "config.json"], {"config.json", "model.safetensors"}) == sorted(there[1:])


@pytest.mark.slow
def test_what_an_earlier_model_left_in_the_repository_is_not_loaded_for_this_one(tmp_path, finedeep_folder):
    """Loaders take a file of all weights before shards."""
    with running_hub() as (hub, environment):
        earlier = {"model.safetensors": b"an earlier model's", "merges.txt": b"x y", "notes.txt": b"mine"}
        earlier |= {"model-00001-of-00002.safetensors": b"another's", "LICENSE": b"kind", ".gitattributes": b""}
        hub.repositories["org/model"] = [earlier]
        done = push(finedeep_folder, environment)
        assert done.returncode == 0, done.stderr
        files = hub.repositories["org/model"][-1]
    assert earlier.keys() - files.keys() == {
        "model.safetensors", "merges.txt", "model-00001-of-00002.safetensors",
    }  # fmt: skip
    assert "Removing from org/model what this model does not have: merges.txt, model-0" in done.stderr


def test_what_a_training_has_left_is_not_published(tmp_path, finedeep_folder):
    """Trainer pickles its arguments beside a model, the user's token among them."""
    folder = shutil.copytree(finedeep_folder, tmp_path / "model")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_text(TOKEN)
    assert {path.name for path in _files(folder)} == {path.name for path in _files(finedeep_folder)}


@pytest.mark.slow  # as are those below that push more than once: each time three processes load the model
@pytest.mark.parametrize("options", [("--revision", "trial"), ("--create-pr",)], ids=str)
def test_push_beside_main(finedeep_folder, options):
    with running_hub() as (hub, environment):
        hub.repositories["org/model"] = [{}]
        done = push(finedeep_folder, environment, *options, "--quiet")
        assert done.returncode == 0, done.stderr
        branch = "trial" if "--revision" in options else "refs/pr/1"
        there = hub.repositories["org/model"][hub.branches["org/model", branch]]
    assert {"README.md", "config.json"} <= set(there)
    assert ("org/model", "main") not in hub.branches
    assert done.stderr == ""
    assert done.stdout == (f"{hub.url}/org/model/discussions/1\n" if branch != "trial" else f"{hub.url}/org/model\n")


def refused(done, *words):
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("finedeep: error: ")]
    for word in words:
        assert word in error
    assert "Traceback" not in done.stderr


def test_a_refused_token(finedeep_folder):
    with running_hub() as (_, environment):
        refused(push(finedeep_folder, {**environment, "HF_TOKEN": "hf_wrong"}), "HTTP 401", "hf auth login")


@pytest.mark.slow
def test_a_full_account_then_room(finedeep_folder):
    with running_hub() as (hub, environment):
        hub.quota = 10_000
        refused(push(finedeep_folder, environment), "HTTP 403", "Storage quota exceeded", "free some storage")
        hub.quota = None
        assert push(finedeep_folder, environment).returncode == 0


@pytest.mark.slow  # the client tries a broken upload again five times, waiting longer each time
def test_a_connection_cut_in_a_file_then_whole(finedeep_folder):
    with running_hub() as (hub, environment):
        hub.cuts = 1000
        refused(push(finedeep_folder, environment), "connection to the Hub broke", "run the same command again")
        assert "config.json" not in hub.repositories["org/model"][-1]
        hub.cuts = 0
        assert push(finedeep_folder, environment).returncode == 0
        puts = [path for method, path in hub.requests if method == "PUT"]
        assert len(puts) == len(set(puts))
        assert push(finedeep_folder, environment).returncode == 0  # and once more: nothing is sent twice
        assert [path for method, path in hub.requests if method == "PUT"] == puts


@pytest.mark.slow
def test_a_connection_cut_once_is_tried_again(finedeep_folder):
    with running_hub() as (hub, environment):
        hub.cuts = 1
        assert push(finedeep_folder, environment).returncode == 0


@pytest.mark.slow
def test_a_hub_that_gives_back_other_weights_is_noticed(finedeep_folder):
    with running_hub() as (hub, environment):
        hub.spoils = True
        refused(push(finedeep_folder, environment), "gives other logits", "Do not use that revision")


class ReadOnlyHub:
    """A Hub with the repository, which is public, to which nothing may be written."""

    def repo_info(self, repo_id):
        return SimpleNamespace(private=False)

    def __getattr__(self, name):
        pytest.fail(f"{name} of the Hub was called")


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr("finedeep.convert.hub.push.HfApi", ReadOnlyHub)


def test_a_folder_that_does_not_load_is_not_pushed(tmp_path, finedeep_folder, no_hub):
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    (folder / "modeling_finedeep.py").write_text("raise RuntimeError('broken')\n")
    with pytest.raises(ConversionError, match=r"out does not load on its own: .*broken"):
        push_folder(folder, "org/model", trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "words"), [("modeling_finedeep.py", "another than this version's"), ("more.py", "no file of Finedeep's")]
)
def test_a_folders_own_code_is_not_run_unasked(tmp_path, finedeep_folder, no_hub, name, words):
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    with (folder / name).open("a") as file:
        file.write(f"\nopen({str(tmp_path / 'was_run')!r}, 'w')\n")
    with pytest.raises(ConversionError, match=rf"{name} is {words}.*--trust-remote-code"):
        push_folder(folder, "org/model")
    assert not (tmp_path / "was_run").exists()


def test_what_is_run_is_the_packages_code(tmp_path, finedeep_folder, no_hub, monkeypatch):
    """Even where a file is changed after it was compared."""
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    monkeypatch.setattr(
        "finedeep.convert.hub.push._check_code",
        lambda folder: (folder / "modeling_finedeep.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n"),
    )
    monkeypatch.setattr(ReadOnlyHub, "create_repo", lambda *_, **__: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):  # so far it has come: the model was loaded
        push_folder(folder, "org/model", say=False)
    assert not (tmp_path / "was_run").exists()


def test_code_from_another_repository_is_refused(tmp_path, finedeep_folder, no_hub):
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "org/other--modeling_finedeep.FinedeepForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"takes code from another repository .*org/other--"):
        push_folder(folder, "org/model", trust_remote_code=True)


@pytest.mark.parametrize("name", ["LICENSE", "README.md", "notes"])
@pytest.mark.parametrize("exists", [True, False])
def test_links_out_of_the_folder_are_refused(tmp_path, finedeep_folder, no_hub, name, exists):
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    if exists:
        (tmp_path / "private").write_text("private")
    (folder / name).symlink_to(tmp_path / "private")
    with pytest.raises(ConversionError, match=rf"{name} is a link out of its folder"):
        push_folder(folder, "org/model")


def test_a_receipt_with_a_secret_is_refused(tmp_path, finedeep_folder, no_hub):
    """Of a version that wrote such down."""
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    (folder / "finedeep_healing.json").write_text('{"options": {"training": {"hub_token": "hf_abc"}}}')
    with pytest.raises(ConversionError, match=r"finedeep_healing\.json holds what looks like a password"):
        push_folder(folder, "org/model")


@pytest.mark.parametrize("lacking", ["parameters", "source"])
def test_a_card_that_cannot_be_made_is_noticed_before_anything_is_sent(tmp_path, finedeep_folder, no_hub, lacking):
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    receipt = json.loads((folder / "finedeep_conversion.json").read_text())
    del receipt[lacking]
    (folder / "finedeep_conversion.json").write_text(json.dumps(receipt))
    with pytest.raises(ConversionError, match=rf"finedeep_conversion\.json has {lacking}=None, of which"):
        push_folder(folder, "org/model")


def test_private_to_a_public_repository_is_refused(finedeep_folder):
    with running_hub() as (hub, environment):
        hub.repositories["org/model"] = [{}]
        refused(push(finedeep_folder, environment, "--private"), "org/model exists and is public", "nothing was")
        assert hub.repositories["org/model"] == [{}]
        assert not [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]


def test_a_card_that_the_hub_refuses_is_refused_before_anything_is_sent(tmp_path, finedeep_folder):
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    (folder / "README.md").write_text("---\nlicense_name: kind\n---\nMy card.\n")
    with running_hub() as (hub, environment):
        refused(push(folder, environment), "the Hub refused the model card", "license is missing")
        assert not [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]


@pytest.mark.parametrize(
    ("name", "words"),
    [("config.json", ["holds no config.json", "a Finedeep model"]), ("modeling_finedeep.py", ["lacks its code"])],
)
def test_an_incomplete_folder_is_not_pushed(tmp_path, capsys, finedeep_folder, name, words):
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    (folder / name).unlink()
    assert main(["push", str(folder), "org/model"]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)


def test_a_dense_folder_is_not_pushed(capsys, finedeep_folder):
    assert main(["push", str(finedeep_folder.parent / "dense"), "org/model"]) == 2
    assert "'llama' model" in capsys.readouterr().err


def test_the_card_names_a_hub_source_as_its_base_model():
    config = {"num_expert_sublayers": 1, "num_experts_per_sublayer": 8, "intermediate_size": 64, "num_hidden_layers": 2}
    receipt = {
        "source": {"id": "org/dense", "revision": "0" * 40, "license": {"license": "mit"}},
        "exact": True,
        "parameters": {"dense": 1, "finedeep": 2},
    }
    card = make_card("me/model", "1" * 40, config, receipt, [])
    assert card.data.base_model == "org/dense"
    assert card.data.license == "mit"
    assert "equal the dense model's" in card.text


@pytest.mark.parametrize(
    ("routing", "words"),
    [
        ({}, "weighted by a sigmoid of a score read from its own output."),
        ({"routing_function": "softmax", "routing_input": "hidden_state"}, "a softmax .* read from what the sub-layer"),
    ],
    ids=["default", "other"],
)
def test_the_card_says_how_experts_are_weighted(routing, words):
    config = {"num_expert_sublayers": 1, "num_experts_per_sublayer": 8, "intermediate_size": 64, "num_hidden_layers": 2}
    assert re.search(words, make_card("me/model", "1" * 40, config | routing, None, []).text)


def test_scores_are_not_left_out_of_a_card_of_ones_own(tmp_path, finedeep_folder, no_hub):
    folder = shutil.copytree(finedeep_folder, tmp_path / "out")
    (folder / "README.md").write_text("My card.")
    with pytest.raises(ConversionError, match=r"is the card as it is, and .* would not be in it"):
        push_folder(folder, "org/model", results=tmp_path)


def test_scores_are_wanted_where_they_are_asked_for(tmp_path):
    with pytest.raises(ConversionError, match="holds no results"):
        read_scores(tmp_path)
    (tmp_path / "results_1.json").write_text("{}")
    with pytest.raises(ConversionError, match="has no results"):
        read_scores(tmp_path)
