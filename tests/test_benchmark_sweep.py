"""Sweeps: plans, cells that fail or are killed, and what is not done again; models are plain rules."""

import json
from types import SimpleNamespace

import pytest
from benchmark_toy import ROOT, Rules, vqa_data

from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import sweep
from umm_jax.evaluate.responses import read_lines
from umm_jax.evaluate.store import Folder


@pytest.fixture
def data(tmp_path):
    return vqa_data(tmp_path)


def test_plans_are_put_together():
    ab, xy = sweep.over("run", ["a", "b"]), sweep.over("task", ["x", "y"])
    assert sweep.product(ab, xy) == [{"run": r, "task": t} for r in "ab" for t in "xy"]
    assert sweep.zipped(ab, xy) == [{"run": "a", "task": "x"}, {"run": "b", "task": "y"}]
    assert sweep.chain(ab, xy) == [*ab, *xy]
    reply = sweep.product([{"reply": {"top_p": 0.9}}], [{"reply": {"temperature": 1.0}}])
    assert reply == [{"reply": {"top_p": 0.9, "temperature": 1.0}}]
    with pytest.raises(ConfigError, match="not as many"):
        sweep.zipped(ab, xy[:1])
    with pytest.raises(ConfigError, match="sets run"):
        sweep.product(ab, ab)


def plan_file(tmp_path, body):
    path = tmp_path / "plan.py"
    path.write_text("from umm_jax.evaluate.sweep import *\ndef get_sweep():\n    return " + body)
    return path


@pytest.mark.parametrize(
    "body, message",
    [
        ("[]", "gives no cell"),
        ("[dict(run='a', tusk='b')]", "tusk: unknown key; did you mean 'task'"),
        ("[dict(run='a', task='world-edit')] * 2", "same cell is there twice"),
        ("[dict(run='a', task='world-edit', limit=i) for i in (1, 2)]", "one place of the table"),
        ("[dict(run='a', task='wurld-edit')]", "did you mean 'world-edit'"),
    ],
)
def test_wrong_plans_are_said(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        sweep.read(plan_file(tmp_path, body))


@pytest.mark.parametrize(
    "body, message",
    [
        ("None", "list of mappings"),
        ("[3]", "list of mappings"),
        ("1 / 0", "ZeroDivisionError"),
        ("[", "SyntaxError"),
        ("__import__('nowhere')", "ModuleNotFoundError"),
    ],
)
def test_plans_that_do_not_run_are_one_line(tmp_path, body, message):
    with pytest.raises(ConfigError, match=message):
        sweep.read(plan_file(tmp_path, body))


def test_the_sweep_of_the_demos_is_a_plan():
    cells = sweep.read(ROOT / "configs" / "sweeps" / "world.py")
    assert len(cells) == 24 and {cell.run for cell in cells} == {"runs/demo", "runs/chatumm", "runs/unified"}
    assert {cell.label for cell in cells} == {"MM-Interleaved", "ChatUMM", "UnifiedMLLM"}


def test_names_and_spellings_of_a_cell_do_not_ask_anew():
    one = sweep.Cell("runs/a", "vqav2", name="A", batch_size=2)
    assert one.folder == sweep.Cell("runs//a/", "vqav2", name="B", batch_size=3).folder
    assert one.folder != sweep.Cell("runs/a", "vqav2", seed=1).folder


@pytest.fixture
def models(monkeypatch):
    """Runs "a" and "b" whose models are rules; "c" is none. `models.asked` is every doc that was asked."""
    from umm_jax.config import RunConfig

    known = SimpleNamespace(asked=[], die_after=None, loads=[])

    def answer(conversation, seed):
        if known.die_after is not None and len(known.asked) >= known.die_after:
            raise KeyboardInterrupt
        known.asked.append(conversation.id)
        return f"word {seed % 7}"

    def identify(folder, step=None, weights=None, overrides=()):
        if folder == "c":
            raise DataError("c: no run here")
        return sweep.Identity(RunConfig(family="mm_interleaved", model={}), folder, 3, "raw", (), folder * 3)

    def load_run(folder, *args):
        known.loads.append(folder)
        return Rules(answer)

    monkeypatch.setattr(sweep, "identify", identify)
    monkeypatch.setattr(sweep, "load_run", load_run)
    monkeypatch.setattr(sweep, "attended", lambda loaded: loaded)
    return known


def cells(data):
    parts = sweep.over("run", ["a", "b", "c"]), sweep.over("limit", [8]), sweep.over("batch_size", [2])
    made = sweep.product(*parts, sweep.over("task", ["vqav2"]), sweep.over("data_root", [str(data)]))
    return [sweep.Cell(**cell) for cell in made]


def test_a_cell_that_fails_stops_no_other(tmp_path, data, models):
    said = []
    failed, spent = sweep.run(cells(data), tmp_path, say=said.append)
    assert failed == 1 and spent.docs == 16 and models.loads == ["a", "b"]
    assert "failed: c: no run here" in " ".join(said)
    made = sweep.gathered(cells(data), tmp_path)
    assert [c.missing for c in made.rows["vqav2"]] == ["", "", "failed"] and made.notes == ["c: no run here"]
    lines = list(sweep.dry_run(cells(data), tmp_path))
    assert [line.split(": ")[1] for line in lines[:2]] == ["cached", "cached"]
    assert "cannot be run: c: no run here" in lines[2] and "3 cells, 0 docs to ask" in lines[3]


def test_a_sweep_goes_on_where_it_was(tmp_path, data, models):
    sweep.run(cells(data), tmp_path / "whole")
    whole = [p.read_bytes() for p in sweep.write_tables(cells(data), tmp_path / "whole", "t")]
    models.asked.clear()
    for stop in (3, 5, 9, 13, None):
        models.die_after = stop
        try:
            sweep.run(cells(data), tmp_path / "parts")
        except KeyboardInterrupt:
            pass
    assert [p.read_bytes() for p in sweep.write_tables(cells(data), tmp_path / "parts", "t")] == whole
    kept = [line for f in (tmp_path / "parts").rglob("responses-*") for line in read_lines(f)]
    assert len(kept) == 16 == len({(line["id"], line["request"]) for line in kept})


def test_figures_that_are_not_of_what_is_there_are_made_again(tmp_path, data, models):
    (cell, *_) = cells(data)
    sweep.run([cell], tmp_path)
    folder, path = Folder(tmp_path / cell.folder), tmp_path / cell.folder / "score.json"
    good = path.read_bytes()
    assert sweep.look(cell, tmp_path).done
    for key, value in (("version", 0), ("responses_hash", "x"), ("requests_hash", "x"), ("settings", {})):
        path.write_text(json.dumps(json.loads(good) | {key: value}))
        assert not sweep.look(cell, tmp_path).done, key
        models.asked.clear()
        sweep.run([cell], tmp_path)
        assert path.read_bytes() == good and models.asked == []
    assert folder.score()["n"] == 8
