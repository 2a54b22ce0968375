"""Judging: a perfect and a mute model, resuming, and independence of order and batch."""

import json
from dataclasses import replace
from types import SimpleNamespace

import msgpack
import pytest

from umm_jax import config as configs
from umm_jax.config import EvalConfig, ReplySettings, RunConfig
from umm_jax.conversation import Box, Conversation, Image, ImageData, Text, Turn
from umm_jax.errors import ConfigError, UserError
from umm_jax.evaluate import report, runner
from umm_jax.world import oracles, skills
from umm_jax.world.judge import Judge
from umm_jax.world.scene import WorldConfig
from umm_jax.world.talk import world

WORLD = WorldConfig.preset("tiny")
# What a world without calls is judged by.
PLAIN = [name for name in report.HEADLINE if not name.startswith(("segment", "chain"))]
RUN = RunConfig(
    family="mm_interleaved",
    model={},
    eval=EvalConfig(splits=("iid",), items=14, dialogues=6, batch_size=4),
)


class Perfect:
    """Knows the right replies of every item; notes the shapes and seeds it was asked with."""

    def __init__(self, wrong=lambda item, turn: False):
        self.wrong, self.calls, self.known = wrong, [], {}
        self.params = None

    def reply(self, conversations, settings, seeds):
        self.calls.append(([c.id for c in conversations], list(seeds)))
        return [self.one(c) for c in conversations]

    def one(self, conversation):
        skill, split, seed, index = conversation.id.rsplit("-", 3)
        if conversation.id not in self.known:
            made = skills.items(WORLD, skill, split, int(index) + 1, int(seed))
            self.known |= {item.id: item for item in made}
        item = self.known[conversation.id]
        turn = (len(conversation.turns) - len(item.conversation.turns)) // 2
        assert conversation.turns[-1].role == "user"
        expected = item.expected[turn]
        if self.wrong(item, turn):
            return SimpleNamespace(turn=Turn("assistant", (Text("no idea"),)), images={})
        if expected.target is None:
            shown = [p.ref for t in conversation.turns for p in t.parts if isinstance(p, Image)]
            # A box of the right answer speaks of the right picture; this one of what was drawn.
            parts = [replace(p, of=shown[-1]) if isinstance(p, Box) else p for p in expected.answer.parts]
            return SimpleNamespace(turn=Turn("assistant", tuple(parts)), images={})
        ref = f"drawn-{len(conversation.turns)}"
        picture = ImageData.from_array(world(WORLD).renderer.render(expected.target))
        words = [p for p in expected.answer.parts if isinstance(p, Text)]
        return SimpleNamespace(turn=Turn("assistant", (*words, Image(ref))), images={ref: picture})


def ask(replier, items, batch_size=4):
    return runner.ask(replier, items, ReplySettings(), seed=5, batch_size=batch_size)


@pytest.fixture(scope="module")
def dialogues():
    return skills.items(WORLD, "dialogue", "iid", 6, 1)


def test_own_pictures_are_fed_back_turn_by_turn(dialogues):
    perfect = Perfect()
    outcomes = ask(perfect, dialogues)
    assert [o.item for o in outcomes] == dialogues
    for o in outcomes:
        o.asked.conversation.validate()
        assert len(o.asked.turns) == len(o.item.expected) == 5 and len(o.asked.conversation.turns) == 10
        drawn = [p.ref for t in o.asked.conversation.turns for p in t.parts if isinstance(p, Image)]
        assert drawn and all(ref.startswith("drawn-") for ref in drawn)
    figures = runner.judge_all(Judge(WORLD), outcomes)
    assert figures["dialogue_all_turns"][0] == figures["dialogue_turn_accuracy"][0] == 1
    assert all(o.ok for o in outcomes)
    assert all(len(ids) == 4 for ids, _ in perfect.calls), "every batch is filled up to the same size"


def test_one_wrong_turn_spoils_a_dialogue(dialogues):
    outcomes = ask(Perfect(wrong=lambda item, turn: turn == 2 and item is not None), dialogues)
    figures = runner.judge_all(Judge(WORLD), outcomes)
    assert figures["dialogue_all_turns"][0] == 0
    assert figures["dialogue_turn_accuracy"][0] == pytest.approx(0.8)
    assert not any(o.ok for o in outcomes)


def test_seeds_depend_on_the_item_and_turn_alone(dialogues):
    def seeds(items, batch_size):
        perfect = Perfect()
        ask(perfect, items, batch_size)
        seen, turns = {}, {}
        for ids, numbers in perfect.calls:
            for name, number in dict(zip(ids, numbers)).items():
                turn = turns[name] = turns.get(name, -1) + 1
                seen[name, turn] = number
        return seen

    whole = seeds(dialogues, 4)
    assert len(set(whole.values())) == len(whole) == 30
    assert whole == seeds(dialogues[::-1], 5)
    assert seeds(dialogues[2:3], 1).items() <= whole.items()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder whose model is `folder.replier`."""
    path = tmp_path / "run"
    path.mkdir()
    configs.save(RUN, path / "config.json")
    made = SimpleNamespace(path=path, replier=Perfect(), step=40, fingerprint="f")

    def load_run(run_dir, step=None, weights=None):
        run = configs.load(path / "config.json")
        return SimpleNamespace(
            run=run,
            step=step or made.step,
            weights=weights or "raw",
            replier=made.replier,
            parameters=12,
            fingerprint=made.fingerprint,
        )

    monkeypatch.setattr(runner, "load_run", load_run)
    return made


def test_every_figure_stands_beside_its_oracles(folder):
    results = runner.evaluate(folder.path)
    figures = results["splits"]["iid"]
    assert set(PLAIN) <= set(figures)
    for name in PLAIN:
        row = figures[name]
        assert row["value"] == 1.0 and row["oracles"], name
        assert max(v for k, v in row["oracles"].items() if k not in oracles.IDEALS) < 1, name
        assert row["n"] == (6 if name.startswith("dialogue") else 14)
    assert json.loads((folder.path / "eval" / "results.json").read_text()) == results
    assert "draw_scene_exact" in runner.summary(results)
    page = report.write(folder.path)["html"].read_text()
    assert "all turns right" in page and "Failures" not in page


def test_samples_show_failures_with_what_was_right(folder):
    folder.replier = Perfect(wrong=lambda item, turn: item.skill == "edit" or turn == 1)
    runner.evaluate(folder.path)
    samples = msgpack.unpackb((folder.path / "eval" / "samples.msgpack").read_bytes())
    edits = [s for s in samples if s["skill"] == "edit"]
    assert edits and not any(s["ok"] for s in edits) and all(s["before"] and s["target"] for s in edits)
    assert all(s["ok"] for s in samples if s["skill"] == "vqa")
    dialogue = next(s for s in samples if s["skill"] == "dialogue")
    assert [dialogue["verdicts"][k]["ok"] for k in sorted(dialogue["verdicts"])] == [
        True,
        False,
        True,
        True,
        True,
    ]
    assert Conversation.from_msgpack(dialogue["conversation"]).turns[3].parts == (Text("no idea"),)
    page = report.write(folder.path)["html"].read_text()
    assert "Failures" in page and "not all right" in page


def test_an_interrupted_evaluation_goes_on(folder, monkeypatch):
    add = runner.Store.add

    def interrupted(self, split, skill, *found):
        add(self, split, skill, *found)
        if skill == "edit":
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.Store, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.evaluate(folder.path)
    monkeypatch.setattr(runner.Store, "add", add)
    before = len(folder.replier.calls)
    results = runner.evaluate(folder.path)
    asked = {i.rsplit("-", 3)[0] for ids, _ in folder.replier.calls[before:] for i in ids}
    assert asked == {"vqa", "exists", "count", "describe", "locate", "dialogue"}
    assert set(PLAIN) <= set(results["splits"]["iid"])

    calls = len(folder.replier.calls)
    assert runner.evaluate(folder.path) == results and len(folder.replier.calls) == calls
    folder.step = 60
    assert runner.evaluate(folder.path)["step"] == 60 and len(folder.replier.calls) > calls


def test_other_splits_and_numbers_join_what_was_judged(folder):
    iid = runner.evaluate(folder.path)["splits"]["iid"]
    calls = len(folder.replier.calls)
    results = runner.evaluate(folder.path, splits=["pair"], items=5)
    assert results["splits"]["iid"] == iid and len(folder.replier.calls) > calls
    assert results["splits"]["pair"]["edit_exact"]["n"] == 5
    written = report.collect(folder.path)
    assert written["skills_split"] == "iid" and set(written["splits"]) == {"iid", "pair"}

    def samples():
        return msgpack.unpackb((folder.path / "eval" / "samples.msgpack").read_bytes())

    before = [s["id"] for s in samples()]
    results = runner.evaluate(folder.path, items=3)
    assert results["splits"]["iid"]["edit_exact"]["n"] == 3
    after = [s["id"] for s in samples()]
    assert len(after) == len(set(after)) < len(before)


def test_in_training_figures():
    found = runner.quick(Perfect(), RUN, 3)
    assert found["draw_scene_exact"] == found["edit_exact"] == found["locate_accuracy"] == 1
    assert set(found) <= {*PLAIN, "draw_scene_f1"} and "dialogue_all_turns" not in found


def test_benchmarks_are_asked_in_training(monkeypatch, tmp_path):
    chosen = [{"task": "world-edit", "settings": {"items": 9}, "limit": 5}, {"task": "world_vqa", "limit": 2}]
    made = configs.to_dict(RUN) | {"train": {"eval_every": 1, "eval_items": 0, "benchmarks": chosen}}
    run = configs.from_dict(RunConfig, made)
    perfect = Perfect()
    family = SimpleNamespace(
        config=SimpleNamespace(ModelConfig=WorldConfig), generate=SimpleNamespace(Replier=lambda *_: perfect)
    )
    monkeypatch.setattr("umm_jax.families.get", lambda name: family)
    monkeypatch.setattr("umm_jax.data.tokenizer.Tokenizer.load", lambda path: None)
    on_eval = runner.in_training(run, tmp_path)
    for step in (1, 2):
        found = on_eval(step, "params")
        assert found == {
            "world-edit (items=9)": 1,
            "world-edit (items=9)/parse_rate": 1,
            "world-vqa": 1,
            "world-vqa/parse_rate": 1,
        }
        assert perfect.params is None, "given up for the next step"
    assert len({id for ids, _ in perfect.calls for id in ids}) == 7


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"task": "vqav3"}, "did you mean 'vqav2'"),
        ({"task": "vqav2"}, "needs the folder of its published files"),
        ({"task": "ade20k", "data_root": "x"}, "needs a network"),
    ],
)
def test_benchmarks_that_cannot_be_asked_are_refused_before_training(tmp_path, chosen, message):
    made = configs.to_dict(RUN) | {"train": {"eval_every": 1, "benchmarks": [chosen]}}
    with pytest.raises(UserError, match=message):
        runner.in_training(configs.from_dict(RunConfig, made), tmp_path)


def test_another_model_at_the_same_step_is_judged_anew(folder):
    runner.evaluate(folder.path, items=2)
    folder.replier, folder.fingerprint = Perfect(wrong=lambda item, turn: True), "other"
    assert runner.evaluate(folder.path, items=2)["splits"]["iid"]["edit_exact"]["value"] == 0


def test_one_benchmark_twice_is_refused(tmp_path):
    chosen = [{"task": "world-edit", "limit": 2}] * 2
    made = configs.to_dict(RUN) | {"train": {"eval_every": 1, "benchmarks": chosen}}
    with pytest.raises(ConfigError, match="world-edit is there twice"):
        runner.in_training(configs.from_dict(RunConfig, made), tmp_path)


def test_an_unknown_split_is_refused_before_anything_is_asked(folder):
    with pytest.raises(ConfigError, match="did you mean 'position'"):
        runner.evaluate(folder.path, splits=["iid", "positions"])
    assert not folder.replier.calls
