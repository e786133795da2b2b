"""`finedeep refresh`: the code of a model that was made earlier, or without, becomes the installed package's."""

import json
import shutil
import tempfile
from pathlib import Path

import finedeep
import pytest
import torch
from finedeep.convert import ConversionError, convert_checkpoint, refresh_code
from finedeep.convert.code_files import CODE_FILES, advice, version_in
from finedeep.convert.hub import standalone
from finedeep_cli import main
from forked import run_command
from hub_server import TOKEN, commit_id, running_hub
from isolated import run_isolated
from safetensors.torch import load_file

NAMES = [file.name for file in CODE_FILES]
MARK = f'__version__ = "{finedeep.__version__}"'
LOGITS = """
import torch, transformers
torch.set_grad_enabled(False)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
answer = model(torch.arange(20)[None]).logits.tolist()
"""
RUNS = "raise RuntimeError('a stranger says hello')\n"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def old(converted, tmp_path):
    """A folder of before versions were noted."""
    folder = shutil.copytree(converted, tmp_path / "old")
    edit(folder / "configuration_finedeep.py", MARK, MARK + "  # which nobody reads")
    edit(folder / "modeling_finedeep.py", "import torch\n", "import torch  # in an older form\n")
    config = json.loads((folder / "config.json").read_text())
    del config["finedeep_version"]
    (folder / "config.json").write_text(json.dumps(config | {"a_field_of_somebody_else": 1}))
    return folder


def test_the_files_that_travel_are_those_that_are_listed_and_say_their_version(converted):
    assert sorted(path.name for path in converted.glob("*.py")) == NAMES
    assert {"configuration_finedeep.py", "modeling_finedeep.py"} <= set(NAMES)
    assert version_in(converted / "configuration_finedeep.py") == finedeep.__version__
    assert json.loads((converted / "config.json").read_text())["finedeep_version"] == finedeep.__version__
    assert advice(converted) is None


def test_an_old_folder_gets_new_code_and_keeps_its_weights(converted, old, capsys):
    before = contents(old)
    weights = (old / "model.safetensors").stat()
    assert main(["refresh", str(old), "--dry-run"]) == 0
    assert contents(old) == before
    would = capsys.readouterr().out
    assert main(["refresh", str(old)]) == 0
    did = capsys.readouterr().out
    assert "weights untouched" in did
    assert would == did.replace("went from", "would go from")
    after = contents(old)
    assert all(after[file.name] == file.read_bytes() for file in CODE_FILES)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {*NAMES, "config.json", "finedeep_conversion.json"} - {
        name for name in NAMES if before.get(name) == after[name]
    }
    assert all(f"  {name}: " in did for name in changed)
    assert (old / "model.safetensors").stat() == weights
    config = json.loads(after["config.json"])
    assert (config["finedeep_version"], config["a_field_of_somebody_else"]) == (finedeep.__version__, 1)
    refreshed = json.loads(after["finedeep_conversion.json"])["refreshed"]
    assert refreshed["versions"]["torch"] == torch.__version__
    assert run_isolated(LOGITS, old) == run_isolated(LOGITS, converted)
    assert main(["refresh", str(old)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(old) == after


def test_a_folder_that_another_program_wrote_without_the_model_loads_again(converted, old):
    """As mergekit leaves it: the configuration's code alone, and references that name a repository."""
    (old / "modeling_finedeep.py").unlink()
    (old / "finedeep_conversion.json").unlink()
    config = json.loads((old / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "somebody/model--configuration_finedeep.FinedeepConfig"}
    (old / "config.json").write_text(json.dumps(config))
    done = refresh_code(old)
    assert done.changes["modeling_finedeep.py"] == "added"
    assert run_isolated(LOGITS, old) == run_isolated(LOGITS, converted)


@pytest.fixture
def forked(monkeypatch):
    """The same script in a process that is forked where torch has been imported already, which saves seconds."""

    def standalone_logits(name):
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "logits.safetensors"
            try:
                run_isolated(f"{standalone.SCRIPT}\nanswer = None", name, "", path)
            except AssertionError as error:
                raise ConversionError(str(error).strip().splitlines()[-1]) from error
            return load_file(path)["logits"]

    monkeypatch.setattr("finedeep.convert.hub.refresh.standalone_logits", standalone_logits)


def test_no_code_of_the_folder_is_run_unless_it_is_trusted(old, forked):
    for name in NAMES:
        (old / name).write_text(RUNS)
    done = refresh_code(old, trust_remote_code=True, dry_run=True)
    assert "a stranger says hello" in done.not_compared  # it was run, and the new code was all the same
    assert (old / "modeling_finedeep.py").read_text() == RUNS
    assert refresh_code(old).not_compared is None
    assert all((old / file.name).read_bytes() == file.read_bytes() for file in CODE_FILES)


def test_logits_of_old_and_new_code_are_compared(old, forked):
    done = refresh_code(old, trust_remote_code=True, dry_run=True)
    assert done.difference == 0
    code = (old / "modeling_finedeep.py").read_text()
    other = "\nFinedeepSublayer.forward = lambda self, h, *_: (h, h[..., :1])\n"
    (old / "modeling_finedeep.py").write_text(code + other)
    before = contents(old)
    with pytest.raises(ConversionError, match="gives other logits with the new code than with the old"):
        refresh_code(old, trust_remote_code=True)
    assert contents(old) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_expert_sublayers": 5},
            "config.json is not a configuration that Finedeep .* knows: .*num_expert_sublayers",
        ),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"finedeep_version": "999.0"}, "config.json is of Finedeep 999.0, newer than the installed"),
    ],
    ids=["value", "dense", "newer"],
)
def test_a_configuration_that_is_not_understood_is_refused(old, changes, words):
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | changes))
    before = contents(old)
    with pytest.raises(ConversionError, match=words):
        refresh_code(old)
    assert contents(old) == before


def test_newer_code_is_not_made_older(old):
    with (old / "configuration_finedeep.py").open("a") as file:
        file.write('__version__ = "999.0"\n')
    with pytest.raises(ConversionError, match=r"configuration_finedeep.py is of Finedeep 999.0, newer than"):
        refresh_code(old)


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_refresh_that_fails_leaves_the_folder_as_it_was(old, monkeypatch, fails_at):
    (old / "modeling_finedeep.py").unlink()
    before, moves, replace = contents(old), [], Path.replace

    def failing(path, target):
        moves.append(target)
        if len(moves) == fails_at:
            raise OSError("no space left")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(ConversionError, match=r"no space left.*Nothing was changed"):
        refresh_code(old)
    assert contents(old) == before


def test_what_a_killed_refresh_was_writing_is_removed(old):
    for left in (".config.json.123.new", ".modeling_finedeep.py.123.old"):
        (old / left).write_text("half")
    (old / ".notes.123.new").write_text("mine")
    refresh_code(old)
    assert {path.name for path in old.iterdir() if path.name.startswith(".")} == {".notes.123.new"}


def test_a_refreshed_folder_can_be_overwritten(dense, old):
    (old / "kernels_finedeep.py").unlink()  # as in a folder from before there was such a file
    receipt = json.loads((old / "finedeep_conversion.json").read_text())
    receipt["files"].remove("kernels_finedeep.py")
    (old / "finedeep_conversion.json").write_text(json.dumps(receipt))
    refresh_code(old)
    convert_checkpoint(dense, old, overwrite=True, progress=False)


OTHER = f'AutoModel.from_pretrained("org/other", revision="{"b" * 40}")'


def test_a_card_that_the_hub_did_not_take_is_written_the_next_time(old, tmp_path):
    card = f'---\nlicense: mit\n---\n{OTHER}\nload("org/model", revision="{"0" * 40}")\n'
    with running_hub() as (hub, environment):
        hub.repositories["org/model"] = [contents(old) | {"README.md": card.encode()}]
        environment |= {"HF_HUB_CACHE": str(tmp_path / "cache")}
        (done,) = run_command(["refresh", "org/model"], environment)
        assert done.returncode == 0, done.stderr
        with_code = hub.repositories["org/model"][1]
        hub.repositories["org/model"] = [hub.repositories["org/model"][0], with_code]  # the card's commit is lost
        hub.branches["org/model", "main"] = 1
        dry, done, last = (
            run_command(["refresh", "org/model", *more], environment)[0] for more in (["--dry-run"], [], [])
        )
        assert [run.returncode for run in (dry, done, last)] == [0, 0, 0], done.stderr
        assert "README.md: pins the revision with the code" in dry.stdout
        assert "nothing to do" in last.stdout
        *_, newest = hub.repositories["org/model"]
    assert len(hub.repositories["org/model"]) == 3
    assert newest["README.md"].decode() == card.replace("0" * 40, commit_id(1))


def test_a_repository_on_the_hub_gets_the_code_by_a_commit(old, tmp_path):
    card = f'---\nlicense: mit\n---\n{OTHER}\nload("org/model", revision="{"0" * 40}")\n'.encode()
    with running_hub() as (hub, environment):
        hub.repositories["org/model"] = [contents(old) | {"README.md": card}]
        environment |= {"HF_HUB_CACHE": str(tmp_path / "cache")}
        done = [
            run_command(["refresh", "org/model", *options], environment)[0]
            for options in (["--dry-run"], ["--create-pr"], [], [])
        ]
        first, *after = hub.repositories["org/model"]
        pull_request, main_branch = hub.branches["org/model", "refs/pr/1"], hub.branches["org/model", "main"]
    assert len(after) == 4  # two commits each, code and card, and none by the others
    assert (pull_request, main_branch) == (2, 4)
    newest = after[-1]
    assert all(newest[file.name] == file.read_bytes() for file in CODE_FILES)
    assert newest["model.safetensors"] == first["model.safetensors"]
    assert [run.returncode for run in done] == [0] * 4, done
    assert "nothing to do" in done[-1].stdout
    assert OTHER in newest["README.md"].decode()  # of another model the revision stays
    assert newest["README.md"].decode().split('"')[-2] in done[-2].stdout
    assert not [path for method, path in hub.requests if method == "PUT" or path.endswith(".safetensors")]
    assert not any(TOKEN in run.stdout + run.stderr for run in done)


def test_commands_say_when_a_folders_code_is_older(old, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("Once upon a time there was a model. " * 20)
    assert main(["inspect", str(old), "--text", str(tmp_path / "text.txt"), "--tokens", "64", "--quiet"]) == 0
    line = f"{old}: its code is of Finedeep before versions were noted, older than the installed {finedeep.__version__}"
    assert line in capsys.readouterr().err
    monkeypatch.setattr("finedeep.eval.evaluation.score", lambda *_, **__: None)
    assert main(["eval", str(old), "--tasks", "arc_easy", "--quiet"]) == 0
    assert line in capsys.readouterr().err

    def stop(*_, **__):
        raise ConversionError("stopped here")

    monkeypatch.setattr("finedeep.convert.hub.push._check_repository", stop)  # what comes after what is told
    assert main(["push", str(old), "org/model"]) == 2
    assert f"replace it: `finedeep refresh {old}`" in capsys.readouterr().err
    assert main(["push", str(old), "org/model", "--trust-remote-code"]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert "stopped here" in error
    assert f"`finedeep refresh {old}`" in error
