"""Benchmarks over files: asking, keeping, resuming and scoring; models are plain rules."""

import json
import math

import numpy as np
import pytest
from benchmark_toy import MODEL, Rules, planned, responses, run, vqa_data

from umm_jax import cli
from umm_jax.config import ReplySettings
from umm_jax.conversation import ImageData, Text, Turn
from umm_jax.errors import BusyError, ConfigError, DataError
from umm_jax.evaluate import asking, benchmark, scoring, tasks
from umm_jax.evaluate.contract import Doc
from umm_jax.evaluate.responses import read_lines
from umm_jax.evaluate.store import Folder
from umm_jax.train.lock import held


@pytest.fixture
def data(tmp_path):
    return vqa_data(tmp_path)


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
