"""Score files side by side: what is compared, what is marked, and what a difference proves."""

import base64
import io

import numpy as np
import PIL.Image
import pytest
from benchmark_toy import PICTURE, Rules, responses, run, vqa_data

from umm_jax.conversation import ImageData
from umm_jax.errors import DataError
from umm_jax.evaluate import benchmark, samples, scoring, table, tasks


@pytest.fixture
def data(tmp_path):
    return vqa_data(tmp_path)


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


def test_small_differences_of_few_docs_prove_nothing():
    """All of n docs better by one: with signs at random, 2 of 2**n choices give as much."""
    for n, p in ((1, None), (2, 0.5), (3, 0.25), (5, 0.0625), (10, 2 / 1024)):
        ids = [str(i) for i in range(n)]
        assert table.paired(dict.fromkeys(ids, 1.0), dict.fromkeys(ids, 0.0)) == p
    twenty = [str(i) for i in range(20)]
    assert table.paired(dict.fromkeys(twenty, 1.0), dict.fromkeys(twenty, 0.0)) < 0.001


def test_a_damaged_score_file_is_said(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        table.read(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match="no score file"):
        table.read(tmp_path / "x.json")
    with pytest.raises(DataError, match="no score.json"):
        table.read(tmp_path)


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


def test_figures_by_other_tools_at_hand_are_not_compared(tmp_path, data):
    a = scored(tmp_path, data, "a", {str(i): "x" for i in range(10)})
    b = table.Column("b", {"vqav2": a.scores["vqav2"] | {"noted": {"words": "ptb-python"}}})
    assert table.build([a, b]).notes == ["not comparable with the first of its row: another tools at hand"]


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
