import json
import random
from functools import partial

from finedeep.demo import run as demo
from finedeep.demo import run_demo
from finedeep.demo.questions import write_tasks
from finedeep.demo.world import RELATIONS, World
from finedeep.eval.compare.scores import scores_of


def test_a_world_is_its_seed():
    assert World.from_seed(1) == World.from_seed(1)
    assert World.from_seed(1) != World.from_seed(2)
    texts = World.from_seed(1).texts(5)
    assert len({next(texts) for _ in range(50)}) > 40


def test_stories_tell_the_facts():
    world = World.from_seed(1)
    for (animal, relation), value in world.facts.items():
        assert value in RELATIONS[relation][1]
        sentence = world.tell(animal, relation, random.Random(0))
        assert animal in sentence
        assert value in sentence
        assert world.quiz(animal, relation).endswith(f"Answer: {value}")


def test_a_short_demo_goes_the_whole_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(demo.MODELS["M=2 K=8 calibrated"][0], "calibration_tokens", 2048)
    monkeypatch.setitem(demo.MODELS["M=2 K=8 calibrated"][0], "calibration_steps", 2)
    monkeypatch.setattr(demo, "write_tasks", partial(write_tasks, samples=12))
    table = run_demo(tmp_path / "demo", seed=5, steps=3)
    assert table in capsys.readouterr().out
    found = {}
    for path in (tmp_path / "demo/results").rglob("results_*.json"):
        results = json.loads(path.read_text())
        found[results["model_name"].rsplit("/", 1)[-1]] = scores_of(results)
    assert set(found) == {"dense", "finedeep-M1-K8", "finedeep-M2-K8-cut", "finedeep-M2-K8-calibrated"}
    assert len(found["dense"]) == 7
    for key, (score, _, _) in found["dense"].items():
        assert abs(found["finedeep-M1-K8"][key][0] - score) <= 1e-3 * abs(score)
    bits = ("demo_text", "bits_per_byte", "none")
    assert found["finedeep-M2-K8-cut"][bits] != found["dense"][bits]
    assert {path.name for path in (tmp_path / "demo/plots").glob("*.png")} == {"activations.png", "gates.png"}
