"""Benchmarks with a judge or a detector: official figures by hand, and what goes wrong on the way to them."""

import http.server
import json
import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from umm_jax import cli
from umm_jax.config import ReplySettings
from umm_jax.conversation import Image, ImageData, Text, Turn
from umm_jax.data.synthesis.rewriters import Endpoint
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import benchmark, judges, scoring, tasks, verdicts
from umm_jax.evaluate.contract import Response
from umm_jax.evaluate.judges import Asked, Cache, JudgeSettings, OpenAI
from umm_jax.evaluate.measures import dependency, groups, viescore
from umm_jax.evaluate.source import Source
from umm_jax.evaluate.tasks import dpg, gedit, geneval, imgedit, wise
from umm_jax.families.contract import Reply

PICTURE = ImageData.from_array(np.full((8, 8, 3), 90, np.uint8))
OTHER = ImageData.from_array(np.full((8, 8, 3), 180, np.uint8))
ABOUT = {"model": "m", "template_hash": "ab"}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def respond(root, ids, without=()):
    """A file of responses, each with a picture, but for some."""
    (root / "p.png").write_bytes(PICTURE.data)
    rows = [{"id": i, "text": "no"} if i in without else {"id": i, "images": ["p.png"]} for i in ids]
    return write_lines(root / "responses.jsonl", rows)


def figures(name, root, responses, partial=False, **settings):
    found = scoring.score(tasks.get(name), root, responses, settings=settings, partial=partial)
    json.dumps(found, allow_nan=False)
    return found


def value(found, name):
    return found["metrics"][name]["value"]


def drawn(*ids):
    turn = Turn("assistant", (Image("p"),))
    return {id: Response(id, (turn,), {"p": PICTURE}) for id in ids}


def docs_of(name, root, **settings):
    task = tasks.get(name)
    return scoring.docs_of(task, Source(root, name), scoring.settings_of(task, settings))


# --- formulas -----------------------------------------------------------------------------------------


def test_means_of_groups_and_what_members_add_to_them():
    # (mean(1, 0) + mean(1)) / 2 = 0.75; with weights 0.2 and 0.8: 0.2 * 0.5 + 0.8 = 0.9.
    parts = {"a": {"x": 1.0, "y": 0.0}, "b": {"z": 1.0}}
    plain = {name: list(members.values()) for name, members in parts.items()}
    assert groups.mean_of_means(plain) == 0.75
    assert groups.mean_of_means(plain, {"a": 0.2, "b": 0.8}) == pytest.approx(0.9)
    assert np.mean(list(groups.weighted(parts).values())) == pytest.approx(0.75)
    assert np.mean(list(groups.weighted(parts, {"a": 0.2, "b": 0.8}).values())) == pytest.approx(0.9)


def test_a_question_whose_parent_failed_fails_whatever_the_order():
    answers = {1: False, 2: True, 3: True, 4: True}
    assert dependency.apply(answers, {1: [0], 2: [1], 3: [2], 4: [0]}) == {
        1: False,
        2: False,
        3: False,
        4: True,
    }
    # 3 stands before its parent 2: in one pass it has not learned yet that 1 failed.
    backwards = {3: [2], 2: [1], 1: [0], 4: [0, 4]}
    assert dependency.apply(answers, backwards)[3] is False
    assert dependency.apply_in_order(answers, backwards)[3] is True
    assert dependency.apply({1: True, 2: True}, {1: [2], 2: [1]}) == {1: True, 2: True}


@pytest.mark.parametrize(
    "reply, read",
    [
        ('{"score": [8, 9], "reasoning": "good"}', [8, 9]),
        ('Sure:\n```json\n{"score": [8,\n 9], "reasoning": ""}\n```', [8, 9]),
        ('||V^=^V||{"score": 7, "reasoning": "a {brace}"}||V^=^V|| {', [7]),
        ('{score: 6, reasoning: "no quotes"}', [6]),
        ('{"score": [4, 5], "reasoning": "a "word" in quotes"}', [4, 5]),
        ('{"reasoning": "a "word", score: 3", "score": [8, 9]}', [8, 9]),
        ('{"reasoning": "a "word", score: 3", "score": [8, 9], "x": 1}', "no score in the answer"),
        ('{"score": 08, "reasoning": ""}', [8]),
        ("[07, 5]", [7, 5]),
        ('{"score": [] "reasoning": "score: 3"}', "no score in the answer"),
        ('{"score": [2.5, 3]}', [2.5, 3]),
        ("[6, 0]", [6, 0]),
        ("7", [7]),
        ("", "no score in the answer"),
        ("I cannot rate this.", "no score in the answer"),
        ('{"reasoning": "forgot"}', "no score in the answer"),
        ('{"score": []}', "score is no number"),
        ('{"score": ["8", "9"]}', "score is no number"),
        ('{"score": [11, 9]}', "rating out of range"),
        ('{"score": [NaN, 9]}', "rating out of range"),
        ("12", "rating out of range"),
    ],
)
def test_what_viescore_reads(reply, read):
    assert viescore.ratings(reply) == read


# --- judges -------------------------------------------------------------------------------------------


class Stub(http.server.BaseHTTPRequestHandler):
    """An endpoint that goes through `server.modes`, and says how many it was asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((body, self.headers.get("Authorization")))
        mode = self.server.modes.pop(0) if self.server.modes else "good"
        said = self.server.says or f"verdict {len(self.server.asked)}"
        reply = json.dumps({"choices": [{"message": {"content": said}}]})
        if isinstance(mode, int):
            self.send_error(mode)
            return
        if mode == "hang":
            time.sleep(1)
        reply = {
            "html": "<html>busy</html>",
            "cut": reply[:-9],
            "empty": json.dumps({"choices": []}),
            "null": json.dumps({"choices": [{"message": {"content": None}}]}),
            "blank": json.dumps({"choices": [{"message": {"content": " \n"}}]}),
        }.get(mode, reply)
        data = reply.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if mode == "drops":
            for at in range(0, len(data), 4):
                self.wfile.write(data[at : at + 4])
                self.wfile.flush()
                time.sleep(0.1)
            return
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    made.modes, made.asked, made.says, made.daemon_threads = [], [], "", True
    made.handle_error = lambda *_: None
    thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(judges.random, "random", lambda: -0.49)  # short pauses
    yield made
    made.shutdown()
    made.server_close()


def judge_of(server, path, templates="hash", **options):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    options = {"seconds": 0.4, "tries": 1, **options}
    return OpenAI(Endpoint(url, "org/model", **options), Cache(path), templates)


ASKED = Asked("7", "SC", "rate this", (PICTURE, OTHER))


def test_an_endpoint_is_asked_with_pictures_at_temperature_0_and_never_twice(server, tmp_path, monkeypatch):
    monkeypatch.setenv("UMM_TEST_KEY", "secret")
    judge = judge_of(server, tmp_path / "c", temperature=0.9, key="UMM_TEST_KEY")
    assert judge.identity == "openai/org/model/hash"
    assert judge.ask(ASKED).text == judge.ask(replace(ASKED, id="8")).text == "verdict 1"
    ((body, key),) = server.asked
    assert body["temperature"] == 0 and body["model"] == "org/model" and key == "Bearer secret"
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "image_url"]
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    # From the file, by another process: nothing is asked. Other words, pictures, templates: asked.
    assert judge_of(server, tmp_path / "c").ask(ASKED).text == "verdict 1" and len(server.asked) == 1
    others = [replace(ASKED, prompt="other"), replace(ASKED, pictures=(OTHER, PICTURE))]
    assert [judge.ask(other).text for other in others] == ["verdict 2", "verdict 3"]
    assert judge_of(server, tmp_path / "c", "other").ask(ASKED).text == "verdict 4"
    assert "secret" not in (tmp_path / "c").read_text()


@pytest.mark.parametrize(
    "mode, reason, asked",
    [
        ("hang", "timed out", 2),
        ("drops", "timed out", 2),
        ("html", "malformed answer", 2),
        ("cut", "malformed answer", 2),
        ("empty", "malformed answer", 2),
        ("null", "malformed answer", 2),
        ("blank", "malformed answer", 2),
        (500, "HTTP 500", 2),
        (429, "HTTP 429", 2),
        (400, "HTTP 400", 1),
    ],
)
def test_what_goes_wrong_is_a_reason_and_is_asked_again_later(server, tmp_path, mode, reason, asked):
    server.modes = [mode, mode]
    judge = judge_of(server, tmp_path / "c", tries=2)
    verdict = judge.ask(ASKED)
    assert (verdict.failure, verdict.text, len(server.asked)) == (reason, "", asked)
    server.modes = []
    assert judge.ask(ASKED).text and len(server.asked) == asked + 1, "a failure is not kept"


def test_a_second_try_helps(server, tmp_path):
    server.modes = [503, "html", "good"]
    assert judge_of(server, tmp_path / "c", tries=3).ask(ASKED).text == "verdict 3"


def test_who_refuses_us_stops_everything(server, tmp_path, monkeypatch):
    for code in (401, 403, 404):
        server.modes = [code]
        with pytest.raises(ConfigError, match=f"refuses us: HTTP {code}"):
            judge_of(server, tmp_path / "c", tries=3).ask(ASKED)
    assert len(server.asked) == 3
    with pytest.raises(ConfigError, match="no UMM_TEST_KEY"):
        judge_of(server, tmp_path / "c", key="UMM_TEST_KEY").ask(ASKED)
    closed = OpenAI(Endpoint("http://127.0.0.1:9/v1", "m", seconds=1, tries=1), Cache(tmp_path / "c"), "t")
    assert closed.ask(ASKED).failure == "no connection"
    judge = judge_of(server, tmp_path / "d", budget=1)
    assert judge.ask(ASKED).text and judge.ask(replace(ASKED, prompt="b")).failure == "over budget"


def test_a_cache_survives_being_killed_at_any_byte(tmp_path):
    path = tmp_path / "c"
    for k in range(3):
        Cache(path).put(f"k{k}", f"text {k}\n…", {"model": "m"})
    whole = path.read_bytes()
    last = whole[: whole.rindex(b"\n", 0, -1)]  # without the last answer
    for at in range(len(last), len(whole)):
        path.write_bytes(whole[:at])
        cache = Cache(path)
        assert (cache.get("k0"), cache.get("k1")) == ("text 0\n…", "text 1\n…")
        cache.put("new", "after", {})
        again = Cache(path)
        assert again.get("new") == "after" and again.get("k1") == "text 1\n…"
        assert again.get("k2") in (None, "text 2\n…")


def test_a_whole_benchmark_is_judged_once(server, tmp_path):
    asked = [replace(ASKED, id=str(k), prompt=f"rate {k}") for k in range(10)]
    server.modes = ["good"] * 4 + [500]
    path = tmp_path / "verdicts.jsonl"
    counts = judges.collect(judge_of(server, tmp_path / "c"), asked, path, workers=1)
    assert counts == {"asked": 10, "failed": 1} and len(server.asked) == 10
    judge = judges.Recorded(path)
    assert judge.identity == "openai/org/model/hash"
    assert judge.ask(asked[0]).text == "verdict 1" and judge.ask(asked[4]).failure == "HTTP 500"
    assert judge.ask(replace(ASKED, id="x")).failure == "no verdict"
    # Killed before the file was written: the next run asks for what had failed, and for nothing else.
    path.unlink()
    counts = judges.collect(judge_of(server, tmp_path / "c"), asked, path, workers=3)
    assert counts == {"asked": 10, "failed": 0} and len(server.asked) == 11
    assert [row["id"] for row in verdicts.lines(path)] == [one.id for one in asked]


def test_kinds_of_judges(tmp_path):
    nobody = judges.make(JudgeSettings(), {})
    assert nobody.identity == "none" and nobody.ask(ASKED).failure == "no judge"
    path = write_lines(tmp_path / "v", [{"id": 7, "question": "SC", "score": 3, **ABOUT}])
    recorded = judges.make(JudgeSettings("recorded", recorded=str(path)), {})
    assert recorded.identity == "recorded/m/ab" and recorded.ask(ASKED).score == 3
    made = judges.make(
        JudgeSettings("openai", url="http://localhost/v1", model="m", cache=str(tmp_path / "c")), {"": "a"}
    )
    assert made.identity == f"openai/m/{judges.template_hash({'': 'a'})}"
    assert judges.template_hash({"": "a"}) != judges.template_hash({"": "b"})
    for bad in ({"kind": "recorded"}, {"kind": "openai", "url": "http://x"}):
        with pytest.raises(ConfigError, match="needs `"):
            JudgeSettings(**bad)
    assert judges.filled("{a} {b} <c>", {"{a}": "{b}", "{b}": "2"}) == "{b} 2 <c>"


@pytest.mark.parametrize(
    "rows, problem",
    [
        (
            [{"id": 1, "text": "a", **ABOUT}, {"id": 2, "text": "a", **ABOUT, "model": "n"}],
            "two judges in one",
        ),
        ([{"id": 1, "text": "a", **ABOUT}, {"id": 2, "text": "a", **ABOUT, "kind": "openai"}], "two judges"),
        ([{"id": 1, "text": "a", **ABOUT}, {"id": 1, "text": "b", **ABOUT}], "came before"),
        ([{"id": 1, "text": "a", "model": "m"}], "whose is it"),
        ([{"id": 1, "text": "a", "score": 2, **ABOUT}], "one of 'text', 'score', 'failure'"),
        ([{"text": "a", **ABOUT}], "needs 'id'"),
        ([{"id": 1, "text": 5, **ABOUT}], "needs 'id', and one of"),
    ],
)
def test_recorded_verdicts_that_cannot_be_used(rows, problem):
    with pytest.raises(DataError, match=problem):
        verdicts.recorded(rows, "v.jsonl")


def test_a_failure_may_be_followed_by_a_verdict():
    rows = [{"id": 1, "failure": "timed out", **ABOUT}, {"id": 1, "text": "a", **ABOUT}]
    assert verdicts.recorded(rows, "v").of("1").text == "a"
    twice = [rows[0], rows[0]]
    assert verdicts.recorded(twice, "v").of("1").failure == "timed out"


# --- GenEval ------------------------------------------------------------------------------------------

TAGS = list(geneval.TAGS)


def write_geneval(root, tags=(*TAGS, "counting")):
    rows = [
        {"tag": tag, "include": [{"class": "dog", "count": k + 1}], "prompt": f"a photo of {k}"}
        for k, tag in enumerate(tags)
    ]
    write_lines(root / "evaluation_metadata.jsonl", rows)
    return rows


def geneval_rows(entries, correct, samples=2):
    return [
        {
            "filename": f"/tmp/out/{k:05d}/samples/{s:05d}.png",
            "tag": entry["tag"],
            "prompt": entry["prompt"],
            "correct": bool(correct(k, s)),
            "reason": "",
            "metadata": json.dumps(entry),
        }
        for k, entry in enumerate(entries)
        for s in range(samples)
    ]


def test_geneval_is_a_mean_of_tasks_and_a_missing_picture_is_wrong(tmp_path):
    entries = write_geneval(tmp_path)
    # Counting has two prompts: 1 of 4 right; all other tasks 2 of 2, but position, 1 of 2.
    rows = geneval_rows(entries, lambda k, s: (k, s) not in {(2, 0), (2, 1), (6, 1), (4, 0)})
    write_lines(tmp_path / "results.jsonl", rows)
    ids = [f"{k:05d}/{s:04d}" for k in range(7) for s in range(2)]
    responses = respond(tmp_path, ids)
    found = figures("geneval", tmp_path, responses, samples=2, verdicts="results.jsonl")
    by_hand = (1 + 1 + 1 / 4 + 1 + 1 / 2 + 1) / 6
    assert value(found, "overall") == value(found, "overall_of_found") == pytest.approx(by_hand)
    assert value(found, "correct_images") == pytest.approx(10 / 14) != pytest.approx(by_hand)
    assert value(found, "correct_prompts") == pytest.approx(6 / 7)
    assert value(found, "tag=counting") == 0.25 and value(found, "missing") == 0
    assert found["cost_class"] == "B" and found["parse_rate"] == 1
    # Units are prompts, and their mean is the headline.
    assert len(found["docs"]) == 7 and np.mean(list(found["docs"].values())) == pytest.approx(by_hand)

    # Two right pictures are lost: the official summary does not notice, ours has counting at 0 of 4 of them.
    write_lines(tmp_path / "results.jsonl", [r for r in rows if "/00006/" not in r["filename"]])
    responses = respond(tmp_path, ids, without=["00006/0000"])
    found = figures("geneval", tmp_path, responses, samples=2, verdicts="results.jsonl")
    assert value(found, "tag=counting") == 0 and value(found, "missing") == 2
    assert value(found, "overall") == pytest.approx((1 + 1 + 0 + 1 + 1 / 2 + 1) / 6)
    assert found["metrics"]["overall"]["n"] == 14 and found["n_invalid"] == 1
    assert value(found, "overall_of_found") == pytest.approx((1 + 1 + 0 + 1 + 1 / 2 + 1) / 6)
    kept = [r for r in rows if not r["filename"].endswith("00006/samples/00001.png")]
    write_lines(tmp_path / "results.jsonl", kept)
    found = figures("geneval", tmp_path, respond(tmp_path, ids), samples=2, verdicts="results.jsonl")
    assert value(found, "tag=counting") == 1 / 4 and value(found, "missing") == 1
    assert value(found, "overall_of_found") == pytest.approx((1 + 1 + 1 / 3 + 1 + 1 / 2 + 1) / 6)


def test_geneval_without_verdicts_or_a_task_has_no_figure(tmp_path):
    entries = write_geneval(tmp_path)
    ids = [f"{k:05d}/0000" for k in range(7)]
    found = figures("geneval", tmp_path, respond(tmp_path, ids, without=ids[:1]), samples=1)
    assert value(found, "overall") is None and found["metrics"]["overall"]["reason"] == "no judge"
    assert all(m["value"] is None for m in found["metrics"].values())
    assert found["parse_rate"] == pytest.approx(6 / 7) and found["docs"] == {}
    write_lines(tmp_path / "results.jsonl", geneval_rows(entries, lambda k, s: True, 1))
    some = respond(tmp_path, ids[:5])
    found = figures("geneval", tmp_path, some, partial=True, samples=1, verdicts="results.jsonl")
    assert value(found, "overall") is None and value(found, "tag=colors") == 1
    assert found["metrics"]["overall"]["reason"] == "nothing judged of color_attr"


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"filename": "out/00000/samples/00007.png"}, "set `samples`"),
        ({"filename": "out/00099/samples/00000.png"}, "not among 7 prompts"),
        ({"filename": "out/grid.png"}, "does not end as pictures do"),
        ({"tag": "colors"}, "other metadata than line 1"),
        ({"metadata": json.dumps({"include": [{"class": "cat", "count": 1}]})}, "other metadata"),
        ({"filename": "out/00001/samples/00000.png", "tag": "two_object", "metadata": None}, "there twice"),
        ({"correct": "yes"}, "another type"),
    ],
)
def test_geneval_results_of_something_else_are_refused(tmp_path, change, problem):
    entries = write_geneval(tmp_path)
    rows = geneval_rows(entries, lambda k, s: True, 1)
    rows[0] |= change
    write_lines(tmp_path / "results.jsonl", rows)
    with pytest.raises(DataError, match=problem):
        docs_of("geneval", tmp_path, samples=1, verdicts="results.jsonl")


def test_geneval_writes_what_the_official_evaluator_reads(tmp_path):
    entries = write_geneval(tmp_path, TAGS[:2])
    docs = docs_of("geneval", tmp_path, samples=2)
    assert [d.turns[0].text for d in docs] == [e["prompt"] for e in entries for _ in range(2)]
    missing = geneval.export(docs, drawn("00000/0000", "00000/0001", "00001/0001"), tmp_path / "out")
    assert missing == ["00001/0000"]
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*"))
    assert files == [
        "00000/metadata.jsonl",
        "00000/samples/0000.png",
        "00000/samples/0001.png",
        "00001/metadata.jsonl",
        "00001/samples/0001.png",
    ]
    assert json.loads((tmp_path / "out/00001/metadata.jsonl").read_text()) == entries[1]
    with pytest.raises(DataError, match="not empty"):
        geneval.export(docs, {}, tmp_path / "out")


# --- DPG-Bench ----------------------------------------------------------------------------------------

HEAD = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language"
)
QUESTIONS = [
    ("pp97", 1, "0", "entity - whole (cat)", "Is there a cat?"),
    ("pp97", 2, "1", "attribute - color (cat, red)", "Is the cat red?"),
    ("pp97", 3, "1, 2", "relation - spatial (cat, mat)", "Is the red cat on a mat, at left?"),
    ("coco5", 1, "0", "entity - whole (dog)", "Is there a dog?"),
    ("coco5", 2, "0", "entity - part (tail)", "Is there a tail?"),
]


def write_dpg(root, questions=QUESTIONS):
    rows = [f'{i},"text, of {i}",,{q},"{d}",x,y,"{t}","{words}"' for i, q, d, t, words in questions]
    (root / "dpg_bench.csv").write_text("\n".join([HEAD, *rows]) + "\n")


def detail(answers, size=512):
    """Lines of the official detail file, of {(item, picture): [answer, ...]}."""
    lines = []
    for (item, picture), said in answers.items():
        left, top = size * (picture % 2), size * (picture // 2)
        words = [w for i, *_, w in QUESTIONS if i == item]
        crop = (left, top, left + size, top + size)
        lines += [f"out/{item}.png, {crop}, {w}, {a}" for w, a in zip(words, said)]
    return "\n".join(lines) + "\n"


DPG = {
    ("pp97", 0): ["yes", "yes", "no"],  # 2/3
    ("pp97", 1): ["no", "yes", "yes"],  # both others depend on it: 0
    ("coco5", 0): ["yes", "yes"],
    ("coco5", 1): ["no", "dog"],
}
DPG_IDS = [f"{item}/{picture}" for item, picture in DPG]


def test_dpg_dependencies_items_and_categories(tmp_path):
    write_dpg(tmp_path)
    (tmp_path / "a_detail.txt").write_text(detail(DPG))
    found = figures("dpg", tmp_path, respond(tmp_path, DPG_IDS), samples=2, verdicts="a_detail.txt")
    # (mean(2/3, 0) + mean(1, 0)) / 2 = (1/3 + 1/2) / 2
    assert value(found, "overall") == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)
    assert found["docs"] == {"pp97": pytest.approx(100 / 3), "coco5": 50}
    # Categories come before dependencies: entity yes, no | yes, yes, no, no ("dog" is no yes).
    assert value(found, "category=entity") == pytest.approx(100 * 3 / 6)
    assert value(found, "category=attribute") == 100 and value(found, "category=relation") == 50
    assert value(found, "detailed=entity - whole") == 50 and value(found, "detailed=entity - part") == 50
    assert value(found, "other_answers") == 1 and found["cost_class"] == "B"


def test_dpg_released_loses_its_first_item_and_looks_at_the_last_picture_alone(tmp_path):
    write_dpg(tmp_path)
    (tmp_path / "a_detail.txt").write_text(detail(DPG))
    responses = respond(tmp_path, DPG_IDS)
    # The official tool never asks the first question, so its file does not hold it.
    asked = {k: v[1:] if k[0] == "pp97" else v for k, v in DPG.items()}
    lines = detail(DPG).splitlines()
    lines = [line for line in lines if "Is there a cat?" not in line]
    assert len(lines) == sum(map(len, asked.values()))
    (tmp_path / "b_detail.txt").write_text("\n".join(lines))
    released = dict(samples=2, verdicts="b_detail.txt", compat="released")
    found = figures("dpg", tmp_path, responses, **released)
    assert value(found, "overall") == 50 and list(found["docs"]) == ["coco5"]
    assert "depends on a question that was dropped (2)" in found["metrics"]["overall"]["reason"]
    assert value(found, "category=entity") == 0, "of the last picture"
    # By default the item is left out, and told; the file that has all answers has it.
    found = figures("dpg", tmp_path, responses, samples=2, verdicts="b_detail.txt")
    assert value(found, "overall") == 50 and value(found, "skipped") == 2
    assert found["metrics"]["overall"]["reason"] == "2 of 4 left out: a question has no answer (2)"


def test_dpg_a_picture_that_was_not_drawn_is_wrong_and_one_not_judged_is_left_out(tmp_path):
    write_dpg(tmp_path)
    (tmp_path / "a_detail.txt").write_text(detail({k: v for k, v in DPG.items() if k != ("coco5", 0)}))
    settings = dict(samples=2, verdicts="a_detail.txt")
    found = figures("dpg", tmp_path, respond(tmp_path, DPG_IDS, without=["coco5/0"]), **settings)
    assert found["docs"]["coco5"] == 0 and found["n_invalid"] == 1
    assert value(found, "category=entity") == pytest.approx(100 / 6)
    found = figures("dpg", tmp_path, respond(tmp_path, DPG_IDS), **settings)
    assert found["docs"]["coco5"] == 0 and value(found, "skipped") == 1 and found["n_invalid"] == 0
    assert value(found, "category=entity") == 25
    found = figures("dpg", tmp_path, respond(tmp_path, DPG_IDS), samples=2)
    assert value(found, "overall") is None and found["metrics"]["overall"]["reason"] == "no judge"


def test_dpg_reads_plain_and_recorded_answers(tmp_path):
    write_dpg(tmp_path)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "coco5.txt").write_text("a prompt of its own\n")
    assert [d.turns[0].text for d in docs_of("dpg", tmp_path, samples=1)] == [
        "text, of pp97",
        "a prompt of its own",
    ]
    plain = [
        {"item_id": item, "picture": picture, "proposition_id": q, "answer": answer}
        for (item, picture), said in DPG.items()
        for q, answer in enumerate(said, 1)
    ]
    write_lines(tmp_path / "a.jsonl", plain)
    table = [",".join(plain[0])] + [",".join(map(str, row.values())) for row in plain]
    (tmp_path / "a.csv").write_text("\n".join(table))
    ours = [
        {"id": f"{r['item_id']}/{r['picture']}", "question": str(r["proposition_id"]), "text": r["answer"]}
        for r in plain
    ]
    write_lines(tmp_path / "ours.jsonl", [row | ABOUT for row in ours])
    responses = respond(tmp_path, DPG_IDS)
    for name in ("a.jsonl", "a.csv", "ours.jsonl"):
        found = figures("dpg", tmp_path, responses, samples=2, verdicts=name)
        assert value(found, "overall") == pytest.approx(100 * (1 / 3 + 1 / 2) / 2), name
    # A judge writes "Yes."; the released evaluator knows "yes" alone.
    write_lines(tmp_path / "b.jsonl", [r | {"answer": r["answer"].title() + "."} for r in plain])
    found = figures("dpg", tmp_path, responses, samples=2, verdicts="b.jsonl")
    assert value(found, "overall") == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)
    write_lines(
        tmp_path / "ours.jsonl", [row | ABOUT for row in ours[1:]] + [ours[0] | ABOUT | {"model": "n"}]
    )
    with pytest.raises(DataError, match="two judges in one file"):
        figures("dpg", tmp_path, responses, samples=2, verdicts="ours.jsonl")
    failed = [{k: v for k, v in ours[0].items() if k != "text"} | {"failure": "timed out"}, *ours[1:]]
    write_lines(tmp_path / "ours.jsonl", [row | ABOUT for row in failed])
    found = figures("dpg", tmp_path, responses, samples=2, verdicts="ours.jsonl")
    assert found["metrics"]["overall"]["reason"] == "1 of 4 left out: timed out (1)"


def test_dpg_detail_files_name_questions_by_their_words(tmp_path):
    same = [
        ("i", 1, "0", "entity - whole (cat)", "Is there a cat"),
        ("i", 2, "0", "entity - whole (cat)", "Is there a cat, asleep"),
        ("i", 3, "0", "entity - whole (cat)", "Is there a cat"),
    ]
    write_dpg(tmp_path, same)
    lines = ["Is there a cat, yes", "Is there a cat, asleep, no", "Is there a cat, no"]
    text = "\n".join(f"a, (1)/b/i.png, (0, 0, 8, 8), {line}" for line in lines)
    (tmp_path / "a_detail.txt").write_text(text)
    (doc,) = docs_of("dpg", tmp_path, samples=1, verdicts="a_detail.txt")
    assert {q: v.text for q, v in doc.target.answers.items()} == {1: "yes", 2: "no", 3: "no"}
    for more, problem in (
        ("a/i.png, (0, 0, 8, 8), Is there a cat, yes", "answered already"),
        ("a/i.png, (0, 0, 8, 8), Is there a dog, yes", "no such question"),
        ("a/x.png, (0, 0, 8, 8), Is there a cat, yes", "no item 'x'"),
        ("a/i.png, (0, 8, 8, 16), Is there a cat, yes", "docs with verdicts are not in"),
        ("nothing of the kind", "line 4: must be"),
    ):
        (tmp_path / "a_detail.txt").write_text(f"{text}\n{more}\n")
        with pytest.raises(DataError, match=problem):
            docs_of("dpg", tmp_path, samples=1, verdicts="a_detail.txt")


@pytest.mark.parametrize(
    "row, problem",
    [
        (("a", 1, "7", "entity - whole (x)", "Q?"), "depend on 7"),
        (("a", "one", "0", "entity - whole (x)", "Q?"), "must be numbers"),
        (("coco5", 2, "0", "entity - whole (x)", "Q?"), "question 2 twice"),
    ],
)
def test_dpg_damaged_tables_are_named(tmp_path, row, problem):
    write_dpg(tmp_path, [*QUESTIONS, row])
    with pytest.raises(DataError, match=problem):
        docs_of("dpg", tmp_path)


def test_dpg_writes_grids(tmp_path):
    write_dpg(tmp_path)
    docs = docs_of("dpg", tmp_path, samples=4)
    responses = drawn("pp97/0", "pp97/3", "coco5/1")
    missing = dpg.export(docs, responses, tmp_path / "out")
    assert len(missing) == 5 and sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "coco5.png",
        "pp97.png",
    ]
    grid = ImageData((tmp_path / "out" / "pp97.png").read_bytes(), "image/png", 16, 16).array()
    assert grid.shape == (16, 16, 3) and (grid[:8, :8] == 90).all() and (grid[8:, 8:] == 90).all()
    assert not grid[:8, 8:].any() and not grid[8:, :8].any()
    wide = ImageData.from_array(np.zeros((8, 9, 3), np.uint8))
    responses["pp97/1"] = replace(responses["pp97/0"], images={"p": wide})
    with pytest.raises(DataError, match="pp97/1: the evaluator cuts squares .* 9 x 8"):
        dpg.export(docs, responses, tmp_path / "other")
    with pytest.raises(ConfigError, match="one to four"):
        dpg.Settings(samples=5)


# --- WISE ---------------------------------------------------------------------------------------------

WISE_IDS = (1, 2, 401, 568, 701, 801, 901)


def write_wise(root):
    parts = dict(zip(wise.FILES, (range(1, 401), range(401, 701), range(701, 1001))))
    for name, ids in parts.items():
        rows = [
            {"prompt_id": i, "Prompt": f"p{i}", "Explanation": f"e{i} {{prompt}}", "Subcategory": "s"}
            for i in WISE_IDS
            if i in ids
        ]
        (root / name).write_text(json.dumps(rows))


def wise_scores(root, scores, name="v.jsonl"):
    rows = [
        {"prompt_id": i, "Subcategory": "s"} | dict(zip(wise.RATINGS, found)) for i, found in scores.items()
    ]
    return write_lines(root / name, rows)


def test_wiscore_and_its_two_overalls(tmp_path):
    write_wise(tmp_path)
    scores = {1: (2, 2, 2), 2: (0, 0, 1), 401: (1, 1, 1), 568: (2, 0, 0), 701: (0, 2, 0), 801: (1, 0, 2)}
    wise_scores(tmp_path, scores | {901: (2, 1, 0)})
    responses = respond(tmp_path, WISE_IDS)
    found = figures("wise", tmp_path, responses, verdicts="v.jsonl", judge="gpt-4o-2024-05-13")
    # (0.7 c + 0.2 r + 0.1 a) / 2
    culture, time_, space = (1 + 0.05) / 2, 0.5, 0.7
    biology, physics, chemistry = 0.2, 0.45, 0.8
    assert value(found, "category=culture") == pytest.approx(culture)
    assert value(found, "category=chemistry") == pytest.approx(chemistry)
    by_count = 0.4 * culture + 0.167 * time_ + 0.133 * space + 0.1 * (biology + physics + chemistry)
    assert value(found, "overall_by_count") == pytest.approx(by_count)
    plain = (culture + time_ + space + biology + physics + chemistry) / 6
    assert value(found, "overall_unweighted") == pytest.approx(plain) != pytest.approx(by_count)
    assert value(found, "consistency") == pytest.approx(8 / 7) and found["cost_class"] == "C"
    assert np.mean(list(found["docs"].values())) == pytest.approx(by_count)
    assert sum(wise.WEIGHTS.values()) == pytest.approx(1)
    lasts = [0, *(last for last, _ in wise.CATEGORIES.values())]
    shares = [(b - a) / 1000 for a, b in zip(lasts, lasts[1:])]
    assert shares == pytest.approx(list(wise.WEIGHTS.values())), "the authors' weights are shares of prompts"


def test_wise_a_failed_judge_is_left_out_and_never_0(tmp_path):
    write_wise(tmp_path)
    scores = {i: (2, 2, 2) for i in WISE_IDS}
    for sentinel in (999, 9.9):
        wise_scores(tmp_path, scores | {1: (sentinel,) * 3})
        found = figures("wise", tmp_path, respond(tmp_path, WISE_IDS), verdicts="v.jsonl")
        assert value(found, "overall_by_count") == pytest.approx(1) and value(found, "skipped") == 1
        assert found["metrics"]["overall_by_count"]["reason"] == "1 of 7 left out: judge failed (1)"
    wise_scores(tmp_path, {i: s for i, s in scores.items() if i != 901})
    found = figures("wise", tmp_path, respond(tmp_path, WISE_IDS), verdicts="v.jsonl")
    assert value(found, "overall_by_count") is None
    assert "nothing judged of chemistry" in found["metrics"]["overall_by_count"]["reason"]
    # The same without a picture: the model's failure, worth 0.
    found = figures("wise", tmp_path, respond(tmp_path, WISE_IDS, without=(901,)), verdicts="v.jsonl")
    assert value(found, "overall_by_count") == pytest.approx(0.9) and found["n_invalid"] == 1
    found = figures("wise", tmp_path, respond(tmp_path, WISE_IDS, without=(901,)))
    assert (
        value(found, "overall_by_count") is None and found["metrics"]["consistency"]["reason"] == "no judge"
    )
    assert value(found, "skipped") == 7 and found["docs"] == {}


@pytest.mark.parametrize(
    "text, read",
    [
        ("Consistency: 2\nRealism: 1\nAesthetic Quality: 0", (2, 1, 0)),
        ("**Consistency**: 2\n**realism** 1\nAesthetic quality:0", (2, 1, 0)),
        ("Consistency: 2\nRealism: 1\nAesthetic quality\uff1a0", (2, 1)),  # a wide colon is not read
        ("Consistency: 0\nConsistency: 2\nRealism: 1\nAesthetic Quality: 1", (2, 1, 1)),
        ("Consistency: 2\nRealism: 1", (2, 1)),
        ("2\n1\n0", ()),
        ("", ()),
    ],
)
def test_what_wise_reads_in_words(text, read):
    assert tuple(wise.ratings(text).values()) == read


def test_wise_words_are_read_and_what_is_not_there_is_told(tmp_path):
    write_wise(tmp_path)
    good = "Consistency: 2\nRealism: 2\nAesthetic Quality: 2"
    words = {i: good for i in WISE_IDS} | {1: "Consistency: 2\nRealism: 1", 401: good}
    folder = tmp_path / "out"
    folder.mkdir()
    rows = [{"prompt_id": i, "evaluation": text} for i, text in words.items()]
    (folder / "a_full_results.json").write_text(json.dumps(rows[:3]))
    (folder / "b_full_results.json").write_text(json.dumps(rows[3:]))
    wise_scores(folder, {i: (0, 0, 0) for i in WISE_IDS}, "scores.jsonl")  # words go before
    responses = respond(tmp_path, WISE_IDS)
    found = figures("wise", tmp_path, responses, verdicts="out")
    assert value(found, "overall_by_count") == pytest.approx(1)
    assert found["metrics"]["overall_by_count"]["reason"] == "1 of 7 left out: a rating is missing (1)"
    # As the newest release: (0.7 * 2 + 0.2 * 1 + 0) / 2 = 0.8 for prompt 1; culture (0.8 + 1) / 2 = 0.9.
    assert value(found, "overall_by_count_unread_as_0") == pytest.approx(0.6 + 0.4 * 0.9)
    rows[0]["evaluation"] = "Consistency: 7\nRealism: 1\nAesthetic Quality: 1"
    rows[1]["evaluation"] = "Evaluation failed after 10 attempts: timeout"
    write_lines(
        tmp_path / "ours.jsonl", [{"id": r["prompt_id"], "text": r["evaluation"], **ABOUT} for r in rows]
    )
    (folder / "a_full_results.json").write_text(json.dumps(rows[:3]))
    found = figures("wise", tmp_path, responses, verdicts="out")
    reason = found["metrics"]["overall_by_count"]["reason"]
    told = "2 of 7 left out: judge failed (1), rating out of range (1)"
    assert reason == f"nothing judged of culture; {told}"
    assert value(found, "category=culture") is None and value(found, "category=time") == pytest.approx(1)
    found = figures("wise", tmp_path, responses, verdicts="ours.jsonl")
    assert value(found, "skipped") == 2
    for path, problem in (("nowhere", "no such file"), ("p.png", "line 1|not a JSON|holds no")):
        with pytest.raises(DataError, match=problem):
            figures("wise", tmp_path, responses, verdicts=path)


def test_wise_asks_a_judge_about_what_was_drawn(tmp_path):
    write_wise(tmp_path)
    docs = docs_of("wise", tmp_path)
    (asked,) = wise.questions(docs, drawn("401"))
    assert asked.id == "401" and asked.pictures == (PICTURE,)
    assert "Prompt: p401\nExplanation: e401 {prompt}\n" in asked.prompt, "a value is no template"
    assert verdicts.export(docs, drawn("401"), tmp_path / "out") == [str(i) for i in WISE_IDS if i != 401]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["401.png"]
    (tmp_path / wise.FILES[0]).write_text('[{"prompt_id": 2001, "Prompt": "p", "Explanation": "e"}]')
    with pytest.raises(DataError, match="prompts 1 to 1000, not 2001"):
        docs_of("wise", tmp_path)


# --- GEdit-Bench --------------------------------------------------------------------------------------


def write_gedit(root):
    (root / "src.png").write_bytes(OTHER.data)
    rows = [
        {
            "task_type": kind,
            "key": f"k{n}",
            "instruction": f"change {kind} {n}",
            "instruction_language": language,
            "input_image": "src.png",
            "Intersection_exist": n == 0,
        }
        for kind in gedit.GROUPS
        for n in range(3 if kind == "ps_human" else 1)
        for language in ("en", "cn")
    ]
    write_lines(root / "gedit.jsonl", rows)
    return [f"{r['task_type']}/en/{r['key']}" for r in rows if r["instruction_language"] == "en"]


def gedit_csv(path, scores):
    head = "source_image,edited_image,instruction,sementics_score,quality_score,intersection_exist"
    rows = [f"x,/r/m/fullset/{id}.png,i,{sc},{pq},True,{id[-5:-3]}" for id, (sc, pq) in scores.items()]
    path.write_text("\n".join([f"{head},instruction_language", *rows]) + "\n")


def test_gedit_is_a_root_of_each_doc_then_a_mean_of_kinds(tmp_path):
    ids = write_gedit(tmp_path)
    scores = {id: (9, 4) for id in ids}
    scores |= {"ps_human/en/k0": (4, 4), "ps_human/en/k1": (0, 10), "ps_human/en/k2": (2.5, 10)}
    gedit_csv(tmp_path / "v.csv", scores)
    responses = respond(tmp_path, ids)
    found = figures("gedit", tmp_path, responses, verdicts="v.csv", judge="gpt-4.1")
    # sqrt(36) = 6 in ten kinds; ps_human: (4 + 0 + 5) / 3 = 3, and no root of means, sqrt(6.5 / 3 * 8).
    assert value(found, "overall") == pytest.approx((10 * 6 + 3) / 11)
    assert value(found, "kind=ps_human") == pytest.approx(3) != pytest.approx(math.sqrt(6.5 / 3 * 8))
    assert value(found, "semantics") == pytest.approx((10 * 9 + 6.5 / 3) / 11)
    assert value(found, "quality") == pytest.approx((10 * 4 + 8) / 11)
    assert value(found, "intersection_overall") == pytest.approx((10 * 6 + 4) / 11)
    assert value(found, "overall_by_sample") == pytest.approx((10 * 6 + 9) / 13)
    assert np.mean(list(found["docs"].values())) == pytest.approx((10 * 6 + 3) / 11)
    assert found["settings"]["language"] == "en" and found["n"] == 13 and found["scale"] == [0, 10]


def test_gedit_reads_a_judges_words_and_skips_what_cannot_be_read(tmp_path):
    ids = write_gedit(tmp_path)

    def rows(id, sc='{"score": [9, 8], "reasoning": ""}', pq="[2, 7]"):
        return [{"id": id, "question": q, "text": t, **ABOUT} for q, t in (("SC", sc), ("PQ", pq))]

    lines = [row for id in ids for row in rows(id)]
    write_lines(tmp_path / "v.jsonl", lines)
    responses = respond(tmp_path, ids)
    found = figures("gedit", tmp_path, responses, verdicts="v.jsonl")
    assert value(found, "overall") == pytest.approx(4), "sqrt(min(9, 8) * min(2, 7))"
    lines[0]["text"] = "Sorry, no."
    lines[2] = {k: v for k, v in lines[2].items() if k != "text"} | {"failure": "timed out"}
    del lines[5]
    write_lines(tmp_path / "v.jsonl", lines)
    found = figures("gedit", tmp_path, responses, verdicts="v.jsonl")
    assert value(found, "overall") is None and value(found, "skipped") == 3
    reason = found["metrics"]["overall_by_sample"]["reason"]
    assert reason == "3 of 13 left out: no score in the answer (1), no verdict (1), timed out (1)"
    assert value(found, "overall_by_sample") == pytest.approx(4), "what failed is not 0"
    gone = [row for row in lines if row["id"] != ids[0]]
    write_lines(tmp_path / "v.jsonl", gone)
    found = figures("gedit", tmp_path, respond(tmp_path, ids, without=ids[:1]), verdicts="v.jsonl")
    assert value(found, f"kind={ids[0].split('/')[0]}") == 0, "not drawn: wrong"
    found = figures("gedit", tmp_path, responses)
    assert value(found, "overall") is None and found["metrics"]["overall"]["reason"] == "no judge"
    write_lines(tmp_path / "v.jsonl", [lines[1], lines[3] | {"template_hash": "other"}])
    with pytest.raises(DataError, match="two judges in one file"):
        figures("gedit", tmp_path, responses, verdicts="v.jsonl")


def test_gedit_files_of_the_official_tool(tmp_path):
    ids = write_gedit(tmp_path)
    responses = respond(tmp_path, ids)
    (tmp_path / "out").mkdir()
    for kind in gedit.GROUPS:
        mine = [id for id in ids if id.startswith(f"{kind}/")]
        gedit_csv(tmp_path / "out" / f"m_{kind}_gpt_score.csv", {id: (4, 9) for id in mine})
    assert value(figures("gedit", tmp_path, responses, verdicts="out"), "overall") == pytest.approx(6)
    combined = {id: (9, 9) for id in ids} | {id.replace("/en/", "/cn/"): (0, 0) for id in ids}
    gedit_csv(tmp_path / "out" / "m_combined_gpt_score.csv", combined | {ids[0]: ("", 3)})
    found = figures("gedit", tmp_path, responses, verdicts="out")
    assert value(found, "overall_by_sample") == pytest.approx(9) and value(found, "skipped") == 1
    cn = [id.replace("/en/", "/cn/") for id in ids]
    found = figures("gedit", tmp_path, respond(tmp_path, cn), verdicts="out", language="cn")
    assert value(found, "overall") == 0
    gedit_csv(tmp_path / "out" / "n_combined_gpt_score.csv", combined)
    with pytest.raises(DataError, match="several models"):
        figures("gedit", tmp_path, responses, verdicts="out")
    gedit_csv(tmp_path / "w.csv", {"ps_human/en/other": (1, 1)})
    with pytest.raises(DataError, match="1 docs with verdicts are not in this benchmark"):
        figures("gedit", tmp_path, responses, verdicts="w.csv")
    (tmp_path / "w.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has no column edited_image"):
        figures("gedit", tmp_path, responses, verdicts="w.csv")


def test_gedit_in_parquet_is_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    lines = tmp_path / "lines"
    lines.mkdir()
    ids = write_gedit(lines)
    rows = [json.loads(line) for line in (lines / "gedit.jsonl").read_text().splitlines()]
    rows = [row | {"input_image": {"bytes": OTHER.data, "path": None}} for row in rows]
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    docs, same = docs_of("gedit", tmp_path), docs_of("gedit", lines)
    assert [d.id for d in docs] == ids == [d.id for d in same]
    assert [(d.turns, d.group, d.target) for d in docs] == [(d.turns, d.group, d.target) for d in same]
    assert docs[-1].conversation().images["image"].data == OTHER.data
    path.write_bytes(b"PAR1")
    with pytest.raises(DataError, match="damaged"):
        docs_of("gedit", tmp_path)


def test_gedit_asks_twice_and_writes_the_official_folder(tmp_path):
    ids = write_gedit(tmp_path)
    docs = docs_of("gedit", tmp_path)
    sc, pq = gedit.questions(docs, drawn(ids[0]))
    assert (sc.question, pq.question) == ("SC", "PQ") and docs[0].turns[0].text in sc.prompt
    assert sc.pictures == (OTHER, PICTURE) and pq.pictures == (PICTURE,)
    theirs = {"SC": "rule <instruction>", "PQ": "rule"}
    assert next(gedit.questions(docs, drawn(ids[0]), theirs)).prompt == f"rule {docs[0].turns[0].text}"
    assert gedit.export(docs, drawn(ids[0]), tmp_path / "out") == ids[1:]
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert found == [f"fullset/{ids[0]}.png", f"fullset/{ids[0]}_SRCIMG.png"]


# --- ImgEdit ------------------------------------------------------------------------------------------

EDITS = {"10": "add", "11": "add", "12": "remove", "13": "remove", "14": "style"}


def write_imgedit(root):
    (root / "singleturn" / "animal").mkdir(parents=True)
    (root / "singleturn" / "animal" / "1.png").write_bytes(OTHER.data)
    entries = {
        k: {"id": "animal/1.png", "prompt": f"edit {k}", "edit_type": kind} for k, kind in EDITS.items()
    }
    (root / "basic_edit.json").write_text(json.dumps(entries))


def said(*numbers):
    names = ("Prompt Compliance", "Visual Naturalness", "Physical & Detail Integrity")
    lines = [f"{name}: {number}" for name, number in zip(names, numbers)]
    return "\n".join(["Brief reasoning: fine, no 3 errors.", *lines])


@pytest.mark.parametrize(
    "text, read, released",
    [
        (said(5, 4, 3), [5, 4, 3], 4.0),
        ("**Prompt Compliance:** 4\n- Naturalness: **3**\nIntegrity: 2/5.", [4, 3, 2], None),
        (said(5, 4), "not just three ratings", 4.5),
        ("Brief reasoning: 5\n" + said(1, 1, 1), "not just three ratings", 2.0),
        (said(5, 4, 7), "rating out of range", 5.33),
        (said(0, 0, 0), "rating out of range", 0.0),
        ("I think: the score is: 4", "not just three ratings", None),
        ("4\n3\n2", "not just three ratings", None),
        ("", "not just three ratings", None),
    ],
)
def test_what_imgedit_reads_in_words(text, read, released):
    assert imgedit.ratings(text) == read
    assert imgedit.released(text) == released


def test_imgedit_is_a_mean_of_ratings_then_of_types(tmp_path):
    write_imgedit(tmp_path)
    words = {
        "10": said(5, 5, 5),
        "11": said(1, 1, 1),
        "12": said(4, 4, 1),
        "13": said(2, 2, 2),
        "14": said(5, 4, 5),
    }
    (tmp_path / "result.json").write_text(json.dumps(words))
    responses = respond(tmp_path, EDITS)
    found = figures("imgedit", tmp_path, responses, verdicts="result.json", judge="gpt-4o")
    # add (5 + 1) / 2 = 3, remove (3 + 2) / 2 = 2.5, style 14 / 3.
    assert value(found, "type=add") == pytest.approx(3) and value(found, "type=remove") == pytest.approx(2.5)
    assert value(found, "overall_by_type") == pytest.approx((3 + 2.5 + 14 / 3) / 3)
    assert value(found, "overall_by_sample") == pytest.approx((5 + 1 + 3 + 2 + 14 / 3) / 5)
    assert value(found, "released_by_type") == pytest.approx((3 + 2.5 + 4.67) / 3)
    assert value(found, "rating_3") == pytest.approx((5 + 1 + 1 + 2 + 5) / 5)
    assert np.mean(list(found["docs"].values())) == pytest.approx((3 + 2.5 + 14 / 3) / 3)


def test_imgedit_a_parse_failure_is_a_skipped_doc_with_a_reason_and_not_zeros(tmp_path):
    write_imgedit(tmp_path)
    words = {
        "10": said(5, 5, 5),
        "11": "I cannot help with that.",
        "12": {"error": "timeout"},
        "13": said(2, 2, 2),
    }
    (tmp_path / "result.json").write_text(json.dumps(words))
    found = figures("imgedit", tmp_path, respond(tmp_path, EDITS, without=["14"]), verdicts="result.json")
    assert value(found, "type=add") == 5 and value(found, "type=remove") == 2
    assert value(found, "type=style") == 1, "not drawn: the lowest rating"
    assert value(found, "overall_by_type") == pytest.approx(8 / 3) and found["n_invalid"] == 1
    reason = found["metrics"]["overall_by_type"]["reason"]
    assert reason == "2 of 5 left out: judge failed (1), not just three ratings (1)"
    # With a picture of "14" nobody judged the type: no overall figure.
    found = figures("imgedit", tmp_path, respond(tmp_path, EDITS), verdicts="result.json")
    assert value(found, "overall_by_type") is None and value(found, "overall_by_sample") == pytest.approx(3.5)
    assert found["metrics"]["overall_by_type"]["reason"].startswith("nothing judged of style; 3 of 5")
    found = figures("imgedit", tmp_path, respond(tmp_path, EDITS))
    assert {m["value"] for k, m in found["metrics"].items() if k != "skipped"} == {None}
    assert found["metrics"]["overall_by_type"]["reason"] == "no judge" and found["judge"] is None
    rows = [{"id": k, "text": said(3, 3, 3), **ABOUT} for k in list(EDITS)[1:]]
    write_lines(tmp_path / "v.jsonl", [{"id": "10", "score": 5, **ABOUT}, *rows])
    found = figures("imgedit", tmp_path, respond(tmp_path, EDITS), verdicts="v.jsonl")
    assert value(found, "overall_by_type") == pytest.approx((4 + 3 + 3) / 3)
    (tmp_path / "result.json").write_text('{"10": 5}')
    with pytest.raises(DataError, match="must hold the judge's words"):
        docs_of("imgedit", tmp_path, verdicts="result.json")
    (tmp_path / "result.json").write_text(json.dumps({"99": said(1, 1, 1)}))
    with pytest.raises(DataError, match="not in this benchmark"):
        docs_of("imgedit", tmp_path, verdicts="result.json")


def test_imgedit_from_a_judge_to_a_figure(tmp_path, server):
    write_imgedit(tmp_path)
    docs, replies = docs_of("imgedit", tmp_path), drawn(*EDITS)
    asked = list(imgedit.questions(docs, replies))
    assert [a.pictures for a in asked] == [(OTHER, PICTURE)] * 5 and "edit 10" in asked[0].prompt
    theirs = {"add": "add <edit_prompt>", "remove": "remove"}
    with pytest.raises(DataError, match="no words for a judge of edits of type 'style'"):
        list(imgedit.questions(docs, replies, theirs))

    class Three:
        identity = "openai/x/hash"

        def ask(self, asked):
            return verdicts.Verdict(said(3, 3, 3))

    judges.collect(Three(), asked, tmp_path / "v.jsonl")
    found = figures("imgedit", tmp_path, respond(tmp_path, EDITS), verdicts="v.jsonl")
    assert value(found, "overall_by_type") == 3
    # What the stub says is no rating: everything is left out, nothing is 0.
    judges.collect(judge_of(server, tmp_path / "c"), asked, tmp_path / "w.jsonl")
    found = figures("imgedit", tmp_path, respond(tmp_path, EDITS), verdicts="w.jsonl")
    assert value(found, "overall_by_sample") is None and value(found, "skipped") == 5
    assert verdicts.export(docs, drawn("10"), tmp_path / "out") == ["11", "12", "13", "14"]


# --- all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, write, count",
    [
        ("geneval", write_geneval, 28),
        ("dpg", write_dpg, 8),
        ("wise", write_wise, 7),
        ("gedit", write_gedit, 13),
        ("imgedit", write_imgedit, 5),
    ],
)
def test_what_is_asked_names_missing_files_and_hides_the_verdicts(tmp_path, name, write, count):
    with pytest.raises(DataError, match=f"{name} needs .* which is not there; .*published"):
        list(tasks.get(name).docs(Source(tmp_path, name, tasks.get(name).files), tasks.get(name).Settings()))
    write(tmp_path)
    docs = docs_of(name, tmp_path)
    assert len(docs) == count
    for doc in docs:
        doc.conversation().validate()
        assert doc.turns[-1].role == "user" and any(isinstance(p, Text) for p in doc.turns[0].parts)
    with pytest.raises(DataError, match="no such file of verdicts"):
        docs_of(name, tmp_path, verdicts="nowhere.jsonl")
    marks = tasks.get(name).mark(docs[0], Response(docs[0].id), tasks.get(name).Settings())
    assert marks.invalid == "no picture" and not marks.values


def test_ids_that_are_there_twice(tmp_path):
    write_gedit(tmp_path)
    with open(tmp_path / "gedit.jsonl", "a") as file:
        file.write((tmp_path / "gedit.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(DataError, match="twice"):
        docs_of("gedit", tmp_path)
    write_wise(tmp_path)
    row = {"prompt_id": 1, "Prompt": "p", "Explanation": "e"}
    (tmp_path / wise.FILES[1]).write_text(json.dumps([row]))
    with pytest.raises(DataError, match="prompt 1 is there twice"):
        docs_of("wise", tmp_path)


def test_verdicts_are_no_part_of_the_annotations(tmp_path):
    write_wise(tmp_path)
    responses = respond(tmp_path, WISE_IDS)
    wise_scores(tmp_path, {i: (2, 2, 2) for i in WISE_IDS})
    with_, without = (
        figures("wise", tmp_path, responses, verdicts="v.jsonl"),
        figures("wise", tmp_path, responses),
    )
    assert with_["dataset_hash"] == without["dataset_hash"]


def test_other_words_for_a_judge_are_read_by_question(tmp_path):
    known = {"SC": "ours", "PQ": "ours too"}
    path = tmp_path / "t.json"
    path.write_text('{"SC": "theirs"}')
    found = judges.read_templates(path, known)
    assert found == {"SC": "theirs", "PQ": "ours too"}
    assert judges.template_hash(found) != judges.template_hash(known)
    for text, message in (("{", "cannot be read"), ('{"XX": "a"}', "no question"), ("[1]", "JSON object")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            judges.read_templates(path, known)


class Draws:
    """A model that draws the same picture whatever it is asked."""

    def reply(self, conversations, settings, seeds):
        return [Reply(Turn("assistant", (Image("a"),)), {"a": PICTURE}) for _ in conversations]


def test_a_model_is_asked_judged_and_scored_from_the_command_line(tmp_path, server, capsys):
    root, out, verdicts_file = tmp_path / "data", tmp_path / "out", tmp_path / "verdicts.jsonl"
    root.mkdir()
    write_imgedit(root)
    model = {"folder": "x", "family": "f", "step": 1, "weights": "raw", "fingerprint": "f"}
    planned = benchmark.plan(benchmark.Job("imgedit", {}, str(root), {}), model, None, ReplySettings())
    benchmark.write_plan(out, planned, model, 3)
    benchmark.run(out, planned, Draws)
    server.says = said(5, 4, 3)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    words = ["eval", "judge", f"--out={out}", f"--to={verdicts_file}", f"--url={url}", "--model=m"]
    assert cli.main(words) == 0 and "5 asked of openai/m/" in capsys.readouterr().out
    assert len(server.asked) == 5
    assert cli.main(words) == 0 and len(server.asked) == 5, "what is cached is not asked again"
    assert cli.main(["eval", "score", f"--out={out}", "--set", f"verdicts={verdicts_file}"]) == 0
    figures = json.loads((out / "score.json").read_text())
    assert figures["metrics"]["overall_by_type"]["value"] == pytest.approx(4)
    assert figures["judge"].startswith("openai/m/")
    (tmp_path / "t.json").write_text(json.dumps({"": "Rate {edit_prompt}."}))
    assert cli.main([*words, f"--templates={tmp_path / 't.json'}"]) == 0
    assert len(server.asked) == 10, "other words are another judge"
    assert server.asked[-1][0]["messages"][0]["content"][0]["text"].startswith("Rate edit ")
