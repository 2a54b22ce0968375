"""Pictures that others judge: null without them, told with them, and exported for their tools."""

import json

import pytest
from benchmark_toy import MODEL, PICTURE, Rules

from umm_jax import cli
from umm_jax.config import ReplySettings
from umm_jax.evaluate import benchmark, table, tasks
from umm_jax.evaluate.store import Folder


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
