"""Benchmarks over files: asking, keeping, resuming, scoring, tables and sweeps; models are plain rules."""

import base64
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from umm_jax import cli
from umm_jax.config import ReplySettings
from umm_jax.conversation import Image, ImageData, Text, Turn
from umm_jax.errors import BusyError, ConfigError, DataError
from umm_jax.evaluate import asking, benchmark, samples, scoring, sweep, table, tasks
from umm_jax.evaluate.contract import Doc, Response
from umm_jax.evaluate.measures import rle
from umm_jax.evaluate.responses import read, read_lines
from umm_jax.evaluate.store import Appending, Folder
from umm_jax.train.lock import held

ROOT = Path(__file__).resolve().parent.parent
MODEL = {"folder": "runs/x", "step": 3, "weights": "raw", "family": "rules", "fingerprint": "f0"}
PICTURE = ImageData.from_array(np.zeros((4, 4, 3), np.uint8))


class Rules:
    """Answers with the question's last word and its seed; draws when asked to; notes what it was asked."""

    def __init__(self, answer=lambda conversation, seed: f"word {seed % 7}"):
        self.answer, self.asked, self.batches = answer, [], []

    def reply(self, conversations, settings, seeds):
        self.batches.append([c.id for c in conversations])
        found = []
        for c, seed in zip(conversations, seeds):
            self.asked.append(c.id)
            said = self.answer(c, seed)
            if isinstance(said, ImageData):
                turn, images = Turn("assistant", (Image("out"),)), {"out": said}
            else:
                turn, images = Turn("assistant", (Text(said),)), {}
            found.append(SimpleNamespace(turn=turn, images=images))
        return found


@pytest.fixture
def data(tmp_path):
    """VQAv2's two files with ten questions, and the pictures of all but the last."""
    root = tmp_path / "data"
    (root / "val2014").mkdir(parents=True)
    questions, annotations = [], []
    for i in range(10):
        questions.append({"question_id": i, "image_id": i, "question": "Which word" + " now" * (i % 3) + "?"})
        answers = [{"answer": f"word {(i + j // 5) % 7}", "answer_id": j + 1} for j in range(10)]
        annotations.append({"question_id": i, "image_id": i, "answers": answers, "answer_type": "other"})
        if i < 9:
            (root / "val2014" / f"COCO_val2014_{i:012d}.jpg").write_bytes(PICTURE.data)
    (root / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (root / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return root


def planned(data, model=MODEL, **changes):
    job = benchmark.Job(**{"task": "vqav2", "settings": {}, "data_root": str(data), "reply": {}} | changes)
    return benchmark.plan(job, model, None, ReplySettings())


def run(folder, data, replier, batch_size=4, index=0, count=1, **changes):
    made = planned(data, **changes)
    benchmark.write_plan(folder, made, changes.get("model", MODEL), batch_size)
    return benchmark.run(folder, made, lambda: replier, index=index, count=count)


# --- asking and keeping -----------------------------------------------------------------------------


def test_what_is_answered_is_not_asked_again(tmp_path, data):
    rules = Rules()
    spent = run(tmp_path / "out", data, rules)
    assert spent.docs == 10 and sorted(set(rules.asked)) == [str(i) for i in range(9)]
    assert all(len(batch) == 4 for batch in rules.batches)
    again = Rules()
    assert run(tmp_path / "out", data, again).docs == 0 and again.asked == []


@pytest.mark.parametrize(
    "changes",
    [
        {"model": MODEL | {"fingerprint": "other"}},
        {"seed": 1},
        {"reply": {"max_tokens": 3}},
        {"settings": {"prompt": "mm_interleaved"}},
    ],
)
def test_another_request_is_asked_anew(tmp_path, data, changes):
    run(tmp_path / "out", data, Rules())
    assert run(tmp_path / "out", data, Rules(), **changes).docs == 10


def test_another_picture_is_another_request(tmp_path, data):
    run(tmp_path / "out", data, Rules())
    other = ImageData.from_array(np.ones((4, 4, 3), np.uint8))
    (data / "val2014" / "COCO_val2014_000000000003.jpg").write_bytes(other.data)
    rules = Rules()
    assert run(tmp_path / "out", data, rules).docs == 1 and set(rules.asked) == {"3"}
    assert set(Folder(tmp_path / "out").responses()) == {str(i) for i in range(10)}


def test_a_run_goes_on_after_a_torn_line(tmp_path, data):
    whole = tmp_path / "whole"
    run(whole, data, Rules())
    lines = Folder(whole).shards()[0].read_bytes()
    for cut in (len(lines) - 3, len(lines) // 2, 5, 0):
        out = tmp_path / f"cut{cut}"
        benchmark.write_plan(out, planned(data), MODEL, 4)
        path = out / "responses-00000-of-00001.jsonl"
        path.write_bytes(lines[:cut])
        kept = len(read_lines(path, torn=True))
        spent = run(out, data, Rules())
        assert spent.docs == 10 - kept
        assert sorted(path.read_bytes().splitlines()) == sorted(lines.splitlines())


def test_damage_elsewhere_is_said(tmp_path, data):
    run(tmp_path / "out", data, Rules())
    path = Folder(tmp_path / "out").shards()[0]
    path.write_bytes(b'{"id": "1", \n' + path.read_bytes())
    with pytest.raises(DataError, match="line 1: not a JSON object"):
        run(tmp_path / "out", data, Rules())


def test_a_picture_that_cannot_be_read_is_a_counted_failure(tmp_path, data):
    (data / "val2014" / "COCO_val2014_000000000002.jpg").write_bytes(b"no picture")
    run(tmp_path / "out", data, Rules())
    found = Folder(tmp_path / "out").responses()
    assert "COCO_val2014_000000000009.jpg" in found["9"].error
    assert "COCO_val2014_000000000002.jpg" in found["2"].error
    figures = benchmark.score(tmp_path / "out")
    assert figures["n_failed"] == 2 and figures["n"] == 8 and figures["n_invalid"] == 0


def test_one_that_cannot_be_answered_takes_none_of_its_batch_along(tmp_path, data):
    def answer(conversation, seed):
        if conversation.id == "4":
            raise DataError("record 4: too long")
        return f"word {seed % 7}"

    run(tmp_path / "out", data, Rules(answer))
    run(tmp_path / "plain", data, Rules())
    found, plain = (Folder(tmp_path / n).responses() for n in ("out", "plain"))
    assert found["4"].error == "record 4: too long"
    assert all(found[i].text == plain[i].text for i in found if i not in "49")


def test_shares_ask_the_same_batches_as_one_process(tmp_path, data):
    one, shared = Rules(), Rules()
    run(tmp_path / "one", data, one, batch_size=3)
    for index in (1, 0):
        run(tmp_path / "two", data, shared, batch_size=3, index=index, count=2)
    assert sorted(one.batches) == sorted(shared.batches)
    found = [{id: r.turns for id, r in Folder(tmp_path / n).responses().items()} for n in ("one", "two")]
    assert found[0] == found[1] and len(found[0]) == 10
    figures = [benchmark.score(tmp_path / n) for n in ("one", "two")]
    assert figures[0] == figures[1]


def test_two_that_write_one_share_are_refused(tmp_path, data):
    out = tmp_path / "out"
    benchmark.write_plan(out, planned(data), MODEL, 4)
    with held(out, name="run-0-of-1.lock"), pytest.raises(BusyError):
        run(out, data, Rules())
    assert run(out, data, Rules()).docs == 10


def test_pictures_of_replies_are_kept_and_read_back(tmp_path):
    folder = Folder(tmp_path)
    folder.write_plan({}, [("a", "h")])
    drawn = Response("a", (Turn("assistant", (Text("here"), Image("x"))),), {"x": PICTURE})
    shard = Appending(folder, 0, 1)
    shard.add([(drawn, "h")])
    shard.close()
    found = folder.responses()["a"]
    assert found.text == "here" and [p.data for p in found.pictures] == [PICTURE.data]
    (tmp_path / "media" / f"{PICTURE.sha256}.png").write_bytes(b"")
    with pytest.raises(DataError, match="a: the picture"):
        folder.responses()


# --- scoring ----------------------------------------------------------------------------------------


def responses(path, texts):
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in texts.items()))
    return path


def test_score_needs_a_response_to_every_doc_and_to_no_other(tmp_path, data):
    task = tasks.get("vqav2")
    full = {str(i): "word 0" for i in range(10)}
    good = scoring.score(task, data, responses(tmp_path / "r", full))
    assert good["n"] == 10 and good["parse_rate"] == 1
    with pytest.raises(DataError, match="1 of 11 responses are to ids"):
        scoring.score(task, data, responses(tmp_path / "r", full | {"77": "x"}))
    del full["3"]
    with pytest.raises(DataError, match=r"1 of 10 docs have no response \(3\)"):
        scoring.score(task, data, responses(tmp_path / "r", full))
    assert scoring.score(task, data, tmp_path / "r", partial=True)["n"] == 9
    (tmp_path / "r").write_text('{"id": 1, "text": "a"}\n{"id": "1", "text": "b"}\n')
    with pytest.raises(DataError, match="came before"):
        read(tmp_path / "r")


def test_empty_replies_are_invalid_and_counted(tmp_path, data):
    texts = {str(i): "" if i < 4 else "word 1" for i in range(10)}
    found = scoring.score(tasks.get("vqav2"), data, responses(tmp_path / "r", texts))
    assert found["n_invalid"] == found["metrics"]["accuracy"]["n_invalid"] == 4
    assert found["parse_rate"] == pytest.approx(0.6)


def test_the_command_writes_what_the_figures_stand_on(tmp_path, data, capsys):
    path = responses(tmp_path / "r.jsonl", {str(i): f"word {i % 7}" for i in range(10)})
    words = ["eval", "score", "--task=vqav2", f"--data-root={data}", f"--responses={path}"]
    assert cli.main([*words, f"--json={tmp_path / 'out.json'}"]) == 0
    out = json.loads((tmp_path / "out.json").read_text())
    # Of ten answers five are "word i": left out in turn, 4 or 5 others match, which is at least 3.
    assert out["metrics"]["accuracy"]["value"] == 100 and out["stderr"] == 0
    assert (out["n"], out["n_invalid"]) == (10, 0)
    assert {"dataset_hash", "prompt_hash", "post", "cost_class", "judge", "settings"} <= out.keys()
    assert cli.main([*words[:-1], "--responses=nowhere"]) == 3
    assert cli.main([*words, "--set", "split=test"]) == 3
    assert "v2_OpenEnded_mscoco_test2014_questions.json, which is not there" in capsys.readouterr().err
    assert cli.main([*words, "--set", "spilt=test"]) == 2


def test_scores_are_of_the_annotations_that_were_asked(tmp_path, data):
    run(tmp_path / "out", data, Rules())
    path = data / "v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace("word 1", "word 9"))
    with pytest.raises(DataError, match="not those the docs were asked from"):
        benchmark.score(tmp_path / "out")


def test_figures_are_means_of_docs_whatever_the_batches_and_shares(tmp_path, data):
    """Not of batches, whose last one is filled up; and rows that fill it up are not kept."""
    figures = []
    for name, size, count in (("a", 3, 1), ("b", 7, 1), ("c", 4, 3)):
        for index in range(count):
            run(tmp_path / name, data, Rules(), batch_size=size, index=index, count=count)
        figures.append(benchmark.score(tmp_path / name))
        kept = [line["id"] for path in Folder(tmp_path / name).shards() for line in read_lines(path)]
        assert sorted(kept) == [str(i) for i in range(10)]
    assert figures[0] == figures[1] == figures[2] and figures[0]["n"] == 9
    assert figures[0]["metrics"]["accuracy"]["value"] == pytest.approx(
        100 * sum(figures[0]["docs"].values()) / 9
    )


def test_shares_are_merged_by_id_and_not_by_place(tmp_path, data):
    run(tmp_path / "a", data, Rules())
    expected = benchmark.score(tmp_path / "a")
    (shard,) = Folder(tmp_path / "a").shards()
    lines = shard.read_bytes().splitlines(keepends=True)
    # As two processes leave them: in another order, one line in both files.
    shard.write_bytes(b"".join(reversed(lines[4:])))
    (tmp_path / "a" / "responses-00001-of-00002.jsonl").write_bytes(b"".join(lines[:5]))
    assert benchmark.score(tmp_path / "a") == expected


# --- tables -----------------------------------------------------------------------------------------


def scored(tmp_path, data, name, texts, **settings):
    figures = scoring.score(
        tasks.get("vqav2"), data, responses(tmp_path / f"{name}.jsonl", texts), settings=settings
    )
    scoring.write(tmp_path / f"{name}.json", figures)
    return table.Column(name, table.read(tmp_path / f"{name}.json"))


def test_cells_that_are_not_comparable_are_marked(tmp_path, data):
    right = {str(i): f"word {i % 7}" for i in range(10)}
    a = scored(tmp_path, data, "a", right)
    b = scored(tmp_path, data, "b", right | {"0": "no", "1": "no", "2": "no"})
    made = table.build([a, b])
    first, second = made.rows["vqav2"]
    assert first.value == 100 and second.value == pytest.approx(70) and not second.marks
    assert first.p is None and 0.01 < second.p < 0.3
    changed = dict(b.scores["vqav2"]) | {"judge": "gpt", "dataset_hash": "0"}
    made = table.build([a, table.Column("c", {"vqav2": changed})])
    cell = made.rows["vqav2"][1]
    assert cell.p is None and cell.marks == (1,)
    assert made.notes == ["not comparable with the first of its row: another annotations, judge"]
    for text in (table.markdown(made), table.comma_separated(made), table.page(made, "t")):
        assert "another annotations, judge" in text


def test_the_paired_bootstrap_knows_equal_from_different():
    ids = [str(i) for i in range(200)]
    rng = np.random.default_rng(0)
    a = dict(zip(ids, rng.random(200)))
    same = {i: v + e for (i, v), e in zip(a.items(), rng.normal(0, 0.1, 200))}
    worse = {i: v - 0.1 + e for (i, v), e in zip(a.items(), rng.normal(0, 0.1, 200))}
    assert table.paired(a, a) == 1
    assert table.paired(a, worse) < 0.001 < table.paired(a, same)
    assert table.paired(a, {"0": 1.0}) is None
    # 30 docs, of which 4 got worse by one: about as often as chance moves a mean so far.
    some = {str(i): float(i < 4) for i in range(30)}
    assert 0.005 < table.paired(some, dict.fromkeys(some, 0.0)) < 0.1


def test_a_damaged_score_file_is_said(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        table.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="no score file"):
        table.read(tmp_path / "x.json")
    with pytest.raises(DataError, match="no score.json"):
        table.read(tmp_path)


# --- sweeps -----------------------------------------------------------------------------------------


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
        return sweep.Identity(RunConfig(family="mm_interleaved", model={}), folder, 3, "raw", folder * 3)

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
    assert [c.missing for c in made.rows["vqav2"]] == ["", "", "failed: c: no run here"]
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


def test_headlines_of_groups_are_compared_by_group(tmp_path):
    options = {"A": "cat", "B": "dog"}
    rows = ["\t".join(["index", "image", "question", *options, "answer", "category", "split"])]
    png = base64.b64encode(PICTURE.data).decode()
    for index in range(4):
        rows.append("\t".join([str(index), png, "which?", *options.values(), "A", "x", "dev"]))
    (tmp_path / "mmbench_dev_en.tsv").write_text("\n".join(rows) + "\n")
    task = tasks.get("mmbench")
    settings = scoring.settings_of(task)
    name = settings.names[0]
    (tmp_path / "mmbench_dev_en.tsv").rename(tmp_path / name)
    docs = scoring.docs_of(task, scoring.Source(tmp_path, task.name), settings)
    texts = {d.id: d.target["answer"] if int(d.id) % 1_000_000 else "A" for d in docs}
    texts["0"] = "B"
    found = scoring.score(task, tmp_path, responses(tmp_path / "r", texts))
    assert found["docs"] == {"0": 0.0, "1": 1.0, "2": 1.0, "3": 1.0}
    assert found["metrics"]["circular"]["value"] == 75


@pytest.mark.parametrize(
    "mask",
    [
        {"size": [2, 2.0], "counts": [4]},
        {"size": [-2, -2], "counts": [4]},
        {"size": [2, 2], "counts": [10**30]},
        {"size": [2, 2], "counts": [5, -1]},
        {"size": [2, 2], "counts": [3]},
        {"size": [2, 2], "counts": "\x01"},
        {"counts": [4]},
        [4],
    ],
)
def test_masks_that_are_none_are_said(mask):
    with pytest.raises(DataError, match="here: a mask must be"):
        rle.decode(mask, "here")


def test_the_best_and_the_worst_are_shown(tmp_path, data):
    right = {str(i): f"word {i % 7}" for i in range(10)}
    run(tmp_path / "out", data, Rules(lambda c, seed: right[c.id] if int(c.id) < 5 else "<b>no</b>"))
    benchmark.score(tmp_path / "out")
    page = samples.section(tmp_path / "out", "VQA")
    assert page.count("<article") == 8 and page.count("tag good") == page.count("tag bad") == 4
    assert "&lt;b&gt;no&lt;/b&gt;" in page and "<b>no" not in page
    assert page.count("data:image/png;base64,") == 8, "each was shown its picture"
    assert samples.chosen({"a": 1.0, "b": 0.0, "c": 0.5}) == (["a", "c"], ["b"])
    assert samples.chosen({"a": 1.0}) == (["a"], [])
    assert samples.section(tmp_path / "none", "VQA") == ""


def test_large_pictures_are_shown_small():
    large = ImageData.from_array(np.zeros((400, 800, 3), np.uint8))
    with PIL.Image.open(io.BytesIO(samples.small(large))) as shown:
        assert shown.size == (192, 96)
    assert samples.small(PICTURE) == PICTURE.data


def test_replies_of_other_programs_alternate_in_parts(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE.data)
    parts = [{"text": "one"}, {"image": "a.png"}, {"text": "two"}, {"box": [0, 0, 1, 0.5]}]
    responses_file = tmp_path / "r"
    responses_file.write_text(json.dumps({"id": 1, "parts": parts}))
    found = read(responses_file)["1"]
    assert [part.kind for part in found.turns[0].parts] == ["text", "image", "text", "box"]
    assert found.text == "one two" and found.pictures[0].data == PICTURE.data
    for wrong, message in (
        ({"parts": [{"sound": "a"}]}, "a part must be one of"),
        ({"parts": [{"image": "none.png"}]}, "none.png cannot be read"),
        ({"boxes": [[0, 1, 2]]}, "four numbers"),
        ({"text": 3}, "must be a string"),
        ({"answer": "a"}, "has none of"),
    ):
        responses_file.write_text(json.dumps({"id": 1, **wrong}))
        with pytest.raises(DataError, match=message):
            read(responses_file)


# --- judged pictures --------------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path):
    """GenEval with two prompts, one picture each, asked and answered; the official evaluator's verdicts."""
    root = tmp_path / "geneval"
    root.mkdir()
    rows = [
        {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a cow"},
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red dog"},
    ]
    (root / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    job = benchmark.Job("geneval", {"samples": 1}, str(root), {})
    made = benchmark.plan(job, MODEL, None, ReplySettings())
    benchmark.write_plan(out, made, MODEL, 2)
    benchmark.run(out, made, lambda: Rules(lambda c, seed: PICTURE))
    said = [
        {
            "filename": f"x/{k:05d}/samples/0000.png",
            "correct": k == 0,
            "reason": "",
            "metadata": json.dumps(row),
            **row,
        }
        for k, row in enumerate(rows)
    ]
    (root / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in said))
    return out


def test_without_a_judge_a_figure_is_null_and_with_one_it_is_told(drawn, capsys):
    figures = benchmark.score(drawn)
    assert figures["metrics"]["overall"]["value"] is None
    assert figures["metrics"]["overall"]["reason"] == "no judge" and figures["judge"] is None
    assert cli.main(["eval", "score", f"--out={drawn}", "--set", "verdicts=results.jsonl"]) == 0
    figures = Folder(drawn).score()
    by_tag = [figures["metrics"][f"tag={tag}"]["value"] for tag in ("single_object", "colors")]
    assert by_tag == [1, 0] and "mask2former" in figures["judge"]
    assert cli.main(["eval", "score", f"--out={drawn}", "--set", "samples=4"]) == 2
    assert "samples was set when this was planned" in capsys.readouterr().err


def test_who_judged_is_compared_and_where_that_lies_is_not(drawn):
    one = benchmark.score(drawn, judging={"verdicts": "results.jsonl"})
    other = one | {"settings": one["settings"] | {"verdicts": "elsewhere.jsonl"}}
    made = table.build([table.Column("a", {"g": one}), table.Column("b", {"g": other})])
    assert not [note for note in made.notes if "not comparable" in note]
    task = tasks.get("geneval")
    assert table.row_of(task, task.Settings(verdicts="x")) == "geneval"
    made = table.build([table.Column("a", {"g": one}), table.Column("b", {"g": other | {"judge": "me"}})])
    assert [note for note in made.notes if "another judge" in note]


def test_pictures_are_exported_for_the_official_tool(drawn, tmp_path, capsys):
    assert cli.main(["eval", "export", f"--out={drawn}", f"--to={tmp_path / 'to'}"]) == 0
    assert "2 of 2 docs have a picture" in capsys.readouterr().out
    assert (tmp_path / "to" / "00001" / "samples" / "0000.png").exists()
    assert cli.main(["eval", "export", f"--out={drawn}", f"--to={tmp_path / 'to'}"]) == 3
    words = ["eval", "judge", f"--out={drawn}", "--to=v", "--url=http://localhost:1/v1", "--model=m"]
    assert cli.main(words) == 2 and "geneval asks no judge" in capsys.readouterr().err


def test_figures_by_other_tools_at_hand_are_not_compared(tmp_path, data):
    a = scored(tmp_path, data, "a", {str(i): "x" for i in range(10)})
    b = table.Column("b", {"vqav2": a.scores["vqav2"] | {"noted": {"words": "ptb-python"}}})
    assert table.build([a, b]).notes == ["not comparable with the first of its row: another tools at hand"]


# --- what readers of tables might take for something else -------------------------------------------


def test_two_scores_of_one_row_need_a_column_each(tmp_path, data):
    for name in ("a", "b"):
        run(tmp_path / "runs" / name, data, Rules())
        benchmark.score(tmp_path / "runs" / name)
    with pytest.raises(DataError, match="holds two of vqav2"):
        table.read(tmp_path / "runs")
    assert list(table.read(tmp_path / "runs" / "a")) == ["vqav2"]


def test_a_chosen_figure_is_named_and_tables_name_each_column_once(tmp_path, data):
    a = scored(tmp_path, data, "a", {str(i): "word 1" for i in range(10)})
    made = table.build([a], "accuracy/answer_type=other")
    assert "| accuracy/answer_type=other | - |" in table.markdown(made)
    assert "| accuracy | 0 to 100 |" in table.markdown(table.build([a]))
    head = table.comma_separated(made).splitlines()[0].split(",")
    assert len(head) == len(set(head)) and "n" in head


def test_figures_of_other_docs_are_marked_though_none_of_them_has_its_own(tmp_path):
    """Where the headline is of areas added up, score files hold no value of a doc; ids tell them apart."""
    figures = {"docs": {}, "ids_hash": "1", "headline": "x", "metrics": {"x": {"value": 1.0, "stderr": None}}}
    figures["metrics"]["x"] |= {"n": 1, "n_invalid": 0, "reason": ""}
    figures |= {"n_failed": 0, "parse_rate": 1.0, "task": "refcoco-res", "settings": {}, "cost_class": "A"}
    other = figures | {"ids_hash": "2"}
    made = table.build([table.Column("a", {"r": figures}), table.Column("b", {"r": other})])
    assert made.notes == ["not comparable with the first of its row: another docs"]


def test_a_torn_line_in_a_file_of_others_is_damage(tmp_path):
    (tmp_path / "r").write_text('{"id": 1, "text": "a"}\n{"id": 2, "te')
    with pytest.raises(DataError, match="line 2: not a JSON object"):
        read(tmp_path / "r")
    (tmp_path / "r").write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}')
    assert set(read(tmp_path / "r")) == {"1", "2"}


# --- what a reading of the whole found --------------------------------------------------------------


def test_figures_of_other_requests_do_not_stay(tmp_path, data):
    """A model is asked, scored, and trained on; what was planned anew has no figures until it is scored."""
    out = tmp_path / "out"
    run(out, data, Rules(lambda c, seed: "word 1"))
    first = benchmark.score(out)
    run(out, data, Rules(lambda c, seed: "nothing"), model=MODEL | {"fingerprint": "other"})
    assert Folder(out).score() is None
    second = benchmark.score(out)
    assert second["metrics"]["accuracy"]["value"] == 0 < first["metrics"]["accuracy"]["value"]
    assert second["responses_hash"] != first["responses_hash"]


def test_a_plan_that_was_cut_short_is_known(tmp_path, data):
    out = tmp_path / "out"
    run(out, data, Rules())
    plan = (out / "plan.json").read_bytes()
    benchmark.write_plan(out, planned(data, model=MODEL | {"fingerprint": "other"}), MODEL, 4)
    (out / "plan.json").write_bytes(plan)
    with pytest.raises(DataError, match="cut short; plan again"):
        benchmark.score(out)
    (out / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        benchmark.score(out)


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


def test_names_and_spellings_of_a_cell_do_not_ask_anew():
    one = sweep.Cell("runs/a", "vqav2", name="A", batch_size=2)
    assert one.folder == sweep.Cell("runs//a/", "vqav2", name="B", batch_size=3).folder
    assert one.folder != sweep.Cell("runs/a", "vqav2", seed=1).folder


def test_a_line_without_its_end_does_not_count_whatever_it_says(tmp_path, data):
    out = tmp_path / "out"
    run(out, data, Rules())
    (path,) = Folder(out).shards()
    path.write_bytes(path.read_bytes()[:-1])
    assert len(Folder(out).lines()) == 9
    assert run(out, data, Rules()).docs == 1 and len(Folder(out).lines()) == 10


def test_docs_are_not_shared_in_two_ways_at_once(tmp_path, data):
    out = tmp_path / "out"
    benchmark.write_plan(out, planned(data), MODEL, 4)
    with held(out, name="run-1-of-2.lock"), pytest.raises(BusyError, match="shares of another number"):
        run(out, data, Rules())
    assert run(out, data, Rules()).docs == 10


def test_a_likelihood_that_is_no_number_is_a_failure_of_its_doc(tmp_path):
    class Infinite(Rules):
        def score(self, conversation, options):
            return [-math.inf if conversation.id == "a" else -1.0] * len(options)

    docs = [Doc(id, (Turn("user", (Text("?"),)),), options=("x", "y")) for id in "ab"]
    (batch,) = asking.ask(Infinite(), [docs], ReplySettings(), seed=0, batch_size=2)
    assert [a.response.scores for a in batch] == [(), (-1.0, -1.0)] and "not a number" in batch[0].error


def test_what_could_not_be_asked_is_asked_again_where_that_is_wanted(tmp_path, data):
    out = tmp_path / "out"
    run(out, data, Rules(lambda c, seed: (_ for _ in ()).throw(DataError("no")) if c.id == "3" else "a"))
    made = planned(data)
    assert benchmark.run(out, made, lambda: Rules()).docs == 0
    assert benchmark.run(out, made, lambda: Rules(), retry=True).docs == 2, "that one, and the one unread"
    assert benchmark.score(out)["n_failed"] == 1


def test_without_a_doc_that_could_be_marked_figures_are_null(tmp_path, data):
    run(tmp_path / "out", data, Rules(lambda c, seed: (_ for _ in ()).throw(DataError("no"))))
    found = benchmark.score(tmp_path / "out")
    assert found["metrics"]["accuracy"] | {"n": 0} == found["metrics"]["accuracy"]
    assert found["metrics"]["accuracy"]["value"] is None and found["n_failed"] == 10


def test_small_differences_of_few_docs_prove_nothing():
    """All of n docs better by one: with signs at random, 2 of 2**n choices give as much."""
    for n, p in ((1, None), (2, 0.5), (3, 0.25), (5, 0.0625), (10, 2 / 1024)):
        ids = [str(i) for i in range(n)]
        assert table.paired(dict.fromkeys(ids, 1.0), dict.fromkeys(ids, 0.0)) == p
    twenty = [str(i) for i in range(20)]
    assert table.paired(dict.fromkeys(twenty, 1.0), dict.fromkeys(twenty, 0.0)) < 0.001


@pytest.mark.parametrize(
    "line, message",
    [
        ({"boxes": 5}, "'boxes' must be a list"),
        ({"parts": 5}, "'parts' must be a list"),
        ({"scores": "123"}, "'scores' must be numbers"),
        ({"scores": [10**400]}, "'scores' must be numbers"),
        ({"turns": [["a"]]}, "a turn cannot be read"),
        ({"turns": [[{"kind": "text", "text": 5}]]}, "must be strings"),
        ({"turns": [[{"kind": "mask", "of": "a", "size": [2, 2], "rle": [3]}]]}, "a turn cannot be read"),
        ({"turns": [[{"kind": "image", "ref": "../../secret.png"}]]}, "leads out of the folder"),
        ({"images": ["../secret.png"]}, "leads out of the folder"),
        ({"images": ["/secret.png"]}, "leads out of the folder"),
        ({"images": ["a\0.png"]}, "leads out of the folder"),
    ],
)
def test_lines_of_others_that_are_wrong_are_said(tmp_path, line, message):
    (tmp_path / "secret.png").write_bytes(PICTURE.data)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "r").write_text(json.dumps({"id": 1, **line}) + "\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "in" / "r")


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


def test_mistakes_on_the_command_line_are_one_line(tmp_path, data, capsys):
    words = ["eval", "score", "--task=world-edit", f"--data-root={data}", "--responses=r"]
    assert cli.main(words) == 2 and "umm eval plan --run=DIR" in capsys.readouterr().err
    (tmp_path / "s.json").write_text(json.dumps({"schema": 1, "metrics": {}}))
    assert cli.main(["eval", "table", str(tmp_path / "s.json")]) == 3
    with pytest.raises(ConfigError, match="mount the bucket"):
        Folder("gs://bucket/x")


def test_folders_of_pictures_may_be_links(tmp_path, data):
    (data / "val2014").rename(tmp_path / "coco")
    (data / "val2014").symlink_to(tmp_path / "coco")
    run(tmp_path / "out", data, Rules())
    assert benchmark.score(tmp_path / "out")["n"] == 9


def test_the_sweep_of_the_demos_is_a_plan():
    cells = sweep.read(ROOT / "configs" / "sweeps" / "world.py")
    assert len(cells) == 24 and {cell.run for cell in cells} == {"runs/demo", "runs/chatumm", "runs/unified"}
    assert {cell.label for cell in cells} == {"MM-Interleaved", "ChatUMM", "UnifiedMLLM"}
