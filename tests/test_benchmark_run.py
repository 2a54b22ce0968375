"""Benchmarks of a real model through the command line: in shares, again, by likelihood, and killed."""

import json
import os
import subprocess
import sys

import PIL.Image
import pytest
import small_run
from jobs import environment

from umm_jax import cli
from umm_jax.evaluate.store import Folder

TASK = ["--task=world-edit", "--set", "items=5", "--batch-size=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("run"))


def umm(*words):
    assert cli.main([str(w) for w in words]) == 0


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
    """A benchmark that one process asked and scored."""
    out = tmp_path_factory.mktemp("eval") / "one"
    umm("eval", "plan", f"--run={run}", *TASK, f"--out={out}")
    umm("eval", "run", f"--out={out}")
    umm("eval", "score", f"--out={out}")
    return out


def answers(out):
    lines = Folder(out).lines().values()
    return {line["id"]: line for line in lines}


def test_two_processes_give_what_one_gives(run, one, tmp_path):
    """Same seeds, same batches, each in a process of its own, one with the model split over two devices."""
    out = tmp_path / "two"
    umm("eval", "plan", f"--run={run}", *TASK, f"--out={out}")
    asking = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "umm_jax.cli",
                "eval",
                "run",
                f"--out={out}",
                f"--share={k}/2",
            ],
            env={**environment(1 + k), "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in (0, 1)
    ]
    ended = [process.communicate(timeout=500)[1] for process in asking]
    assert not any(process.returncode for process in asking), ended
    umm("eval", "score", f"--out={out}")
    assert [len(p.read_text().splitlines()) for p in Folder(out).shards()] == [3, 2]
    assert answers(out) == answers(one)
    assert (out / "score.json").read_bytes() == (one / "score.json").read_bytes()
    assert (out / "scores.jsonl").read_bytes() == (one / "scores.jsonl").read_bytes()


def test_what_is_done_is_not_done_again(run, one, capsys):
    before = {p: p.stat().st_mtime_ns for p in Folder(one).shards()}
    umm("eval", "plan", f"--run={run}", *TASK, f"--out={one}")
    umm("eval", "run", f"--out={one}")
    assert {p: p.stat().st_mtime_ns for p in Folder(one).shards()} == before
    assert "5 docs, 5 of them answered" in (said := capsys.readouterr().out) and "0 docs in" in said


def test_figures_stand_beside_oracles(one):
    figures = json.loads((one / "score.json").read_text())
    assert figures["headline"] == "edit_exact" and figures["n"] == 5 and figures["model"]["step"] == 1
    assert {"edit_exact", "edit_exact@copy_last_image", "edit_exact@random_object"} <= figures[
        "metrics"
    ].keys()
    assert figures["docs"].keys() == answers(one).keys()


def test_a_changed_model_must_be_planned_again(run, one, tmp_path, capsys):
    out = tmp_path / "stale"
    umm("eval", "plan", f"--run={run}", *TASK, f"--out={out}")
    tokenizer = run / "tokenizer.model"
    kept = tokenizer.read_bytes()
    try:
        tokenizer.write_bytes(kept + b" ")
        assert cli.main(["eval", "run", f"--out={out}"]) == 3
    finally:
        tokenizer.write_bytes(kept)
    assert "plan again" in capsys.readouterr().err


def test_a_ranking_benchmark_asks_for_likelihoods(run, tmp_path):
    rows = {"question": 0, "answer": 0, "answer_options": [0, 1, 2], "gt_index": 0}
    data = {"dialogs": [{"image_id": 1, "caption": "a red circle", "dialog": [rows]}]}
    data |= {"questions": ["what colour is it"], "answers": ["red", "blue", "green"]}
    (tmp_path / "visdial_1.0_val.json").write_text(json.dumps({"data": data}))
    graded = [{"image_id": 1, "round_id": 1, "gt_relevance": [1.0, 0.0, 0.0]}]
    (tmp_path / "visdial_1.0_val_dense_annotations.json").write_text(json.dumps(graded))
    (tmp_path / "VisualDialog_val2018").mkdir()
    picture = tmp_path / "VisualDialog_val2018" / f"VisualDialog_val2018_{1:012d}.jpg"
    PIL.Image.new("RGB", (32, 32)).save(picture)
    out = tmp_path / "out"
    umm("eval", "plan", f"--run={run}", "--task=visdial", f"--data-root={tmp_path}", f"--out={out}")
    umm("eval", "run", f"--out={out}")
    umm("eval", "score", f"--out={out}")
    (line,) = answers(out).values()
    assert len(line["scores"]) == 3 and all(s < 0 for s in line["scores"]) and "turns" not in line
    assert json.loads((out / "score.json").read_text())["parse_rate"] == 1


@pytest.mark.slow
def test_a_sweep_is_killed_and_goes_on(run, tmp_path):
    """Twelve cells, killed after random numbers of replies: the same tables, and nothing asked twice."""
    plan = tmp_path / "plan.py"
    plan.write_text(
        "from umm_jax.evaluate.sweep import over, product\n\n\ndef get_sweep():\n"
        f"    run = over('run', [{str(run)!r}])\n"
        "    tasks = over('task', ['world-edit', 'world-vqa', 'world-draw-scene'])\n"
        "    sizes = [{'settings': {'items': 4}, 'batch_size': 2}]\n"
        "    seeds, replies = over('seed', [0, 1]), over('reply', [{}, {'temperature': 1.0}])\n"
        "    return product(run, tasks, sizes, seeds, replies)\n"
    )

    def sweep(out, stop=None):
        process = subprocess.Popen(
            [sys.executable, "-m", "umm_jax.cli", "sweep", str(plan), f"--out={out}"],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None:
            if stop is not None and replies(out) >= stop:
                process.kill()
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        return process.returncode

    def replies(out):
        return sum(p.read_bytes().count(b"\n") for p in out.rglob("responses-*.jsonl"))

    assert sweep(tmp_path / "whole") == 0
    for stop in (2, 6, 8, 14, 18, 22, 30, 34, 40, 44):
        assert sweep(tmp_path / "parts", stop) == -9
    assert sweep(tmp_path / "parts") == 0
    for kind in ("md", "csv", "html"):
        name = f"table.{kind}"
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    kept = [
        (p.parent.name, json.loads(line)["id"])
        for p in (tmp_path / "parts").rglob("responses-*.jsonl")
        for line in p.read_text().splitlines()
    ]
    assert len(kept) == len(set(kept)) == 48
