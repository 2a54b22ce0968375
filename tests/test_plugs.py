"""Our models in other suites: lmms-eval where it is installed (make test-lmms), VLMEvalKit by a stand-in."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import small_run

from umm_jax.config import ReplySettings
from umm_jax.conversation import Image, ImageData, Text, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import plugs
from umm_jax.families.contract import Reply
from umm_jax.generate import load_run, seed_of

QUESTION = "what is in the top left"


def pictures(folder, count=5):
    paths = []
    for i in range(count):
        paths.append(folder / f"{i}.png")
        PIL.Image.new("RGB", (32, 32), (50 * i, 0, 0)).save(paths[-1])
    return paths


# --- what both have in common -----------------------------------------------------------------------


def test_messages_become_a_conversation(tmp_path):
    (path,) = pictures(tmp_path, 1)
    image = PIL.Image.new("L", (4, 6), 7)
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": "and"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "ok"}]},
        {"role": "user", "content": [{"type": "image", "image": str(path)}, {"type": "text", "text": "?"}]},
    ]
    c = plugs.conversation("x", messages)
    c.validate()
    assert [t.role for t in c.turns] == ["system", "user", "assistant", "user"]
    assert c.turns[1].parts == (Image("image0"), Text("and"))
    assert (c.images["image0"].width, c.images["image0"].height) == (4, 6)
    assert (c.images["image0"].array() == 7).all()
    with pytest.raises(DataError, match="holds video"):
        plugs.conversation("x", [{"role": "user", "content": [{"type": "video", "url": "a"}]}])
    with pytest.raises(DataError, match="picture cannot be read"):
        plugs.conversation("x", [{"role": "user", "content": [{"type": "image", "url": "nowhere.png"}]}])


@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({"max_new_tokens": 8, "temperature": 0, "do_sample": False, "top_p": None}, (8, 0.0, 1.0, 1)),
        ({"temperature": 0.7, "top_p": 0.9}, (64, 0.7, 0.9, 1)),
        ({"temperature": 0.7, "do_sample": False}, (64, 0.0, 1.0, 1)),
        ({"num_beams": 3}, (64, 0.0, 1.0, 3)),
    ],
)
def test_their_settings_are_ours(kwargs, expected):
    found = plugs.settings(kwargs, ReplySettings())
    assert (found.max_tokens, found.temperature, found.top_p, found.beams) == expected


def test_pictures_are_told_by_path(tmp_path):
    drawn = ImageData.from_array(np.zeros((4, 4, 3), np.uint8))
    reply = Reply(Turn("assistant", (Text("here. STOP more"), Image("a"))), {"a": drawn})
    told = json.loads(plugs.text_of(reply, ["STOP"], tmp_path / "out", "doc-3"))
    assert told == {"text": "here.", "images": [str(tmp_path / "out" / "doc-3-0.png")]}
    assert Path(told["images"][0]).read_bytes() == drawn.data
    with pytest.raises(ConfigError, match="out=DIR"):
        plugs.text_of(reply, [], None, "doc-3")
    assert plugs.text_of(Reply(Turn("assistant", (Text("a\n\nb"),))), ["\n\n"], None, "x") == "a"


def test_lmms_eval_would_find_the_entry_point():
    (found,) = [e for e in entry_points(group="lmms_eval.models") if e.name == "umm_jax"]
    assert found.value == "umm_jax.evaluate.plugs:manifest"


# --- a model of a step or two -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run.make(tmp_path_factory.mktemp("run"))


def own_replies(run, names, paths, max_tokens):
    loaded = load_run(run)
    found = []
    for name, path in zip(names, paths):
        content = [{"type": "image", "url": str(path)}, {"type": "text", "text": QUESTION}]
        asked = plugs.conversation(name, [{"role": "user", "content": content}])
        settings = ReplySettings(**(vars(loaded.run.reply) | {"mode": "text", "max_tokens": max_tokens}))
        found.append(loaded.reply([asked], settings, [seed_of(0, name, 1)])[0].turn.text)
    return found


def test_vlmevalkit_class_on_a_stand_in_of_its_base(run, tmp_path, monkeypatch):
    base = ModuleType("vlmeval.vlm.base")
    base.BaseModel = type("BaseModel", (), {})
    for name, module in {"vlmeval": ModuleType("vlmeval"), "vlmeval.vlm": ModuleType("vlmeval.vlm")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", base)
    monkeypatch.delitem(sys.modules, "umm_jax.evaluate.plugs.vlmeval", raising=False)
    from umm_jax.evaluate.plugs.vlmeval import UmmJax

    model = UmmJax(run=str(run), max_new_tokens=6)
    assert issubclass(UmmJax, base.BaseModel) and UmmJax.INTERLEAVE
    (path,) = pictures(tmp_path, 1)
    message = [{"type": "image", "value": str(path)}, {"type": "text", "value": QUESTION}]
    assert model.settings.max_tokens == 6 and model.settings.mode == "text"
    asked = []
    reply = model.loaded.replier.reply
    monkeypatch.setattr(
        model.loaded.replier, "reply", lambda cs, *rest: asked.append(cs[0]) or reply(cs, *rest)
    )
    first = model.generate_inner(message)
    # The same replies as of our own runner, for the id they are asked by.
    assert first == own_replies(run, [asked[0].id], [path], 6)[0] == model.generate_inner(message)
    talk = [{"role": "user", "content": message}, {"role": "assistant", "content": [message[1]]}]
    model.chat_inner([*talk, {"role": "user", "content": [message[1]]}])
    assert [turn.role for turn in asked[-1].turns] == ["user", "assistant", "user"]
    assert asked[-1].turns[0].parts == (Image("image0"), Text(QUESTION))
    monkeypatch.delitem(sys.modules, "umm_jax.evaluate.plugs.vlmeval", raising=False)


TASK = """\
task: tiny_local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/tiny.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  do_sample: false
process_results: !function utils.results
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
import PIL.Image


def visual(doc):
    return [PIL.Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def results(doc, found):
    return {"exact": float(found[0] == doc["answer"])}
"""


def test_the_real_lmms_eval_runs_a_local_task_with_our_entry_point(run, tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms")
    paths = pictures(tmp_path)
    expected = own_replies(run, [f"tiny_local-{i}" for i in range(5)], paths, 6)
    # The answers are the model's own to all but the last: 4 of 5 are right.
    rows = [
        {"image": str(p), "question": QUESTION, "answer": a} for p, a in zip(paths, [*expected[:4], "no!"])
    ]
    (tmp_path / "tiny.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "utils.py").write_text(UTILS)
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lmms_eval", "--model", "umm_jax", "--model_args", f"run={run}"),
            *("--tasks", "tiny_local", "--include_path", str(tmp_path), "--batch_size", "2"),
            *("--output_path", str(out), "--log_samples"),
        ],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("*_results.json")
    figures = json.loads(results.read_text())["results"]["tiny_local"]
    assert next(v for k, v in figures.items() if k.startswith("exact,")) == pytest.approx(0.8)


def test_lmms_eval_likelihoods(run, tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms")
    from umm_jax.evaluate.plugs.lmms import UmmJax

    (path,) = pictures(tmp_path, 1)
    model = UmmJax(run=str(run))
    model.task_dict = {"t": {"test": {0: {"image": PIL.Image.open(path)}}}}
    of = lambda doc: [doc["image"]]  # noqa: E731
    asked = [SimpleNamespace(args=(QUESTION, f" {w}", of, 0, "t", "test")) for w in ("red", "blue", "red")]
    found = model.loglikelihood(asked)
    assert found[0] == found[2] != found[1] and all(value < 0 for value, _ in found)


def test_lmms_eval_rounds(run, tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval has an environment of its own: make test-lmms")
    from umm_jax.evaluate.plugs.lmms import UmmJax

    (path,) = pictures(tmp_path, 1)
    model = UmmJax(run=str(run), batch_size=1)
    model.task_dict = {"t": {"test": {0: {"image": str(path)}}}}
    told = []

    def messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        first = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": QUESTION}]
        if round_idx is None:
            return [{"role": "user", "content": first}]
        told.append((round_idx, previous_output, previous_round_info))
        turns = [{"role": "user", "content": first}]
        for said in previous_output:
            turns += [{"role": "assistant", "content": said or "?"}, {"role": "user", "content": QUESTION}]
        return turns, round_idx == 2, previous_output, f"info {round_idx}"

    request = SimpleNamespace(args=("", messages, {"max_new_tokens": 6}, 0, "t", "test"))
    ((first, second),) = model.generate_until_multi_round([request])
    assert [first] == own_replies(run, ["t-0"], [path], 6) == model.generate_until([request])
    assert told == [(1, [first], None), (2, [first, second], "info 1")]
