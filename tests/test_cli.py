"""The command line: what it refuses, in one line and with which status, and the terminal chat."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from umm_jax import cli, families
from umm_jax import config as configs
from umm_jax.cli import grammar
from umm_jax.config import ReplySettings
from umm_jax.conversation import Box, Conversation, Image, ImageData, Text, Turn
from umm_jax.data.inspect import open_any, statistics
from umm_jax.data.making import make_records
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.demo import demo
from umm_jax.errors import ConfigError, DataError
from umm_jax.generate import chat

ROOT = Path(__file__).resolve().parent.parent


def umm(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main(argv)
    out, err = capsys.readouterr()
    return status, out, err


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, status, said",
    [
        ([], 2, "required: COMMAND"),
        (["trian"], 2, "'trian' is unknown; did you mean 'train'?"),
        (["data", "synthesise"], 2, "did you mean 'synthesize'?"),
        (["train", "--config=c.py", "--workdri=w", "--workdir=w"], 2, "did you mean '--workdir'?"),
        (["train", "--config=nope.py", "--workdir=w"], 2, "nope.py: no such config file"),
        (["train", "--config=c.py", "--workdir=w", "--config.train.steps"], 2, "--config.train.steps=VALUE"),
        (["eval", "--run=w", "--config.eval.items=3"], 2, "unknown argument '--config.eval.items=3'"),
        (["data", "synthesize", "--count=none", "--out=d"], 2, "whole number of at least 1, got 'none'"),
        (["data", "synthesize", "--count=4", "--preset=tinny", "--out=d"], 2, "did you mean 'tiny'?"),
        (["data", "inspect", "/nonexistent"], 3, "/nonexistent: no such data folder"),
        (["data", "stats", "/nonexistent"], 3, "no such data folder"),
        (["report", "--run=/nonexistent"], 4, "/nonexistent"),
        (["chat", "--run=/nonexistent"], 4, "/nonexistent: no run here"),
        (["eval", "--run=/nonexistent"], 4, "/nonexistent: no run here"),
    ],
)
def test_one_clear_line_and_a_status(capsys, tmp_path, monkeypatch, argv, status, said):
    monkeypatch.chdir(tmp_path)
    got, out, err = umm(capsys, *argv)
    assert got == status
    assert err.startswith("umm: error: ") and err.count("\n") == 1 and said in err, err
    assert not out and not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.fixture
def config(tmp_path):
    """A small config file whose data folder does not exist."""
    path = tmp_path / "small.py"
    sources = [{"path": str(tmp_path / "data")}]
    path.write_text(
        "def get_config():\n"
        f"    return {{'family': 'mm_interleaved', 'model': {{}}, 'data': {{'sources': {sources!r}}}}}\n"
    )
    return path


def test_a_config_file_may_take_a_word(config, tmp_path):
    worded = tmp_path / "worded.py"
    body = "{'family': 'mm_interleaved', 'model': {}, 'data': {'tokens': {'long': 640}[word]}}"
    worded.write_text(f"def get_config(word='long'):\n    return {body}\n")
    assert configs.load(f"{worded}:long").data.tokens == configs.load(worded).data.tokens == 640
    with pytest.raises(ConfigError, match="takes no word, so leave out ':long'"):
        configs.load(f"{config}:long")
    with pytest.raises(ConfigError, match="nope.py: no such config file"):
        configs.load("nope.py:long")


@pytest.mark.parametrize(
    "body, said",
    [
        ("None", "a config is a mapping, this is a NoneType"),
        ("{'family': 'mm_interleaved', 'model': {}, 'data': {1, 2}}", "holds what JSON can"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path, body, said):
    (tmp_path / "odd.py").write_text(f"def get_config():\n    return {body}\n")
    with pytest.raises(ConfigError, match=said):
        configs.load(tmp_path / "odd.py")
    (tmp_path / "odd.py").write_text("def get_config(word):\n    return {}\n")
    with pytest.raises(ConfigError, match="needs a word"):
        configs.load(tmp_path / "odd.py")


@pytest.mark.parametrize(
    "words, said",
    [
        (["data", "synthesize", "--count=1", "--out=x", "--rewriter=openai"], "--rewriter is of --from"),
        (["data", "synthesize", "--count=1", "--out=x", "--stages=1"], "--stages is of --from"),
        (
            ["plan", "--config=FILE", "--topology=v5e:2x2", "--sweep", "--html=x"],
            "--html: --sweep only prints",
        ),
        (
            ["plan", "--config=FILE", "--topology=v5e:2x2", "--placements", "--json=x"],
            "--placements only prints",
        ),
        (["experts", "--serve=x", "--port=70000"], "from 0 to 65535"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(capsys, config, words, said):
    status, _, err = umm(capsys, *(word.replace("FILE", str(config)) for word in words))
    assert status == 2 and said in err


@pytest.mark.parametrize("name", ["chatumm_7b", "chatumm_7b_c", "mm_interleaved_13b"])
def test_a_flagship_has_presets_for_topologies(name):
    path = f"configs/{name}.py"
    plain = configs.load(path)
    for chips in ("v5p-64", "v6e-64", "v5e-256"):
        preset = configs.load(f"{path}:{chips}")
        assert preset.model != plain.model and preset.data.sources == plain.data.sources
    with pytest.raises(ConfigError, match="no preset for 'v5p-63'; there are v5p-64, v6e-64, v5e-256"):
        configs.load(f"{path}:v5p-63")


@pytest.mark.parametrize(
    "override, said",
    [
        ("--config.train.stepz=3", "config.train.stepz: unknown key; did you mean 'steps'?"),
        ("--config.train.steps=many", "config.train.steps: expected int, got 'many'"),
        ("--config.train.steps=0", "steps, accumulate, log_every and save_every must be positive"),
        ("--config.optim.schedule=cosin", "'cosin' is not allowed; did you mean 'cosine'?"),
        ("--config.optim.clip=0", "clip must be positive"),
        ("--config.train.keep=0", "keep must be at least 1"),
        ("--config.train.keep_best=turns 1", "set eval_every"),
        ("--config.eval.batch_size=0", "batch_size must be at least 1"),
        ("--config.data.align.token=128", "the axes are tokens, images"),
        ("--config.family=mm_interleaves", "did you mean 'mm_interleaved'?"),
        ("--config.model.backbon={}", "config.model.backbon: unknown key; did you mean 'backbone'?"),
    ],
)
def test_wrong_overrides_name_the_key_and_the_nearest(capsys, tmp_path, config, override, said):
    status, _, err = umm(capsys, "train", f"--config={config}", f"--workdir={tmp_path / 'run'}", override)
    assert status == 2 and said in err, err


def test_an_empty_data_folder_is_said_so(capsys, tmp_path):
    (tmp_path / "data").mkdir()
    status, _, err = umm(capsys, "data", "stats", str(tmp_path / "data"))
    assert status == 3 and "the data folder is empty" in err and "umm data synthesize" in err


def test_overrides_in_both_spellings():
    words = ["--config.a.b=1", "--config.c", "2", "odd"]
    assert cli.split_overrides(words) == (["--config.a.b=1", "--config.c=2"], ["odd"])


def test_ctrl_c_is_130_and_bugs_keep_their_traceback(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_version", lambda args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert umm(capsys, "version")[0] == 130
    monkeypatch.setattr(cli, "_version", lambda args: {}["a bug"])
    with pytest.raises(KeyError):
        cli.main(["version"])


def test_a_full_disk_is_said_so(capsys, monkeypatch):
    def full(args):
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr(cli, "_version", full)
    status, _, err = umm(capsys, "version")
    assert status == 6 and "/data/x: No space left on device" in err


def test_as_a_program():
    run = subprocess.run([sys.executable, "-m", "umm_jax.cli", "version"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.startswith("umm_jax "), run.stderr


def test_families_by_name():
    assert families.get("mm_interleaved").stream.Serializer
    with pytest.raises(ConfigError, match="did you mean 'mm_interleaved'"):
        families.get("mm_interleave")
    with pytest.raises(AttributeError, match="has no part 'modle'"):
        getattr(families.get("mm_interleaved"), "modle")  # noqa: B009  # what a misspelling does


# --- looking at data ----------------------------------------------------------------------------------


def record(index: int) -> Conversation:
    pixels = ImageData.from_array(np.full((4, 6, 3), index, np.uint8))
    turns = (
        Turn("user", (Image("a"), Text("where is the dot")), op="ask"),
        Turn("assistant", (Box("a", (0.0, 0.25, 0.5, 0.75)),), loss=True, depends_on=(0,), op="ask"),
    )
    return Conversation(f"r{index}", turns, {"a": pixels}, source="here", license="CC0-1.0")


def test_inspect_and_stats(capsys, tmp_path):
    make_records(record, 5, tmp_path / "data", how={"test": True}, shards=2)
    status, out, _ = umm(capsys, "data", "inspect", str(tmp_path / "data"), "--index=3", "--count=9")
    assert status == 0 and "records 3 to 4 of 5" in out
    for expected in ("record r3", "CC0-1.0", "where is the dot", "6 x 4 image/png", "0.250", "depends on 0"):
        assert expected in out, expected
    status, out, _ = umm(capsys, "data", "stats", str(tmp_path / "data"))
    got = json.loads(out)
    assert got["records"] == got["read"] == 5 and got["part"] == {"image": 5, "text": 5, "box": 5}
    assert got["turns per record"] == {"mean": 2.0, "max": 2} and got["license"] == {"CC0-1.0": 5}

    shard = sorted((tmp_path / "data").glob("*.array_record"))[0]
    status, out, _ = umm(capsys, "data", "inspect", str(shard), f"--images={tmp_path / 'pictures'}")
    assert status == 0 and PIL.Image.open(tmp_path / "pictures" / "r0-0.png").size == (6, 4)
    status, _, err = umm(capsys, "data", "inspect", str(shard), "--index=99")
    assert status == 3 and "there is no record 99" in err


def test_json_and_damaged_records_are_named(tmp_path):
    path = tmp_path / "two.jsonl"
    path.write_text(record(0).to_json() + "\n" + record(1).to_json().replace('"user"', '"usher"') + "\n")
    with pytest.raises(DataError, match=r"two.jsonl, line 2: record r1, turn 0 .*usher"):
        open_any(path)
    path.write_text(record(0).to_json() + "\n")
    assert statistics(open_any(path), 10)["records"] == 1
    half = tmp_path / "half.array_record"
    half.write_bytes(b"not whole")
    with pytest.raises(DataError, match="half.array_record: half-written"):
        open_any(half)


def test_the_readme_shows_what_the_demo_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    steps = []
    demo("configs/world_tiny.py", "runs/demo", [], lambda words: steps.append(list(words)))
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    shown = [shlex.split(line)[1:] for line in readme.splitlines() if line.startswith("umm ")]
    done = [sorted(word for word in step if not word.startswith("--workers")) for step in steps]
    assert [sorted(words) for words in shown if words[0] != "chat"] == done


def test_the_data_commands_take_their_world_from_a_config(tmp_path, capsys):
    config = f"--config={ROOT / 'configs' / 'world_tiny.py'}"
    cli.dispatch(
        ["data", "synthesize", config, "--config.world.count=3", f"--out={tmp_path / 'd'}", "--shards=1"]
    )
    how = json.loads((tmp_path / "d" / "manifest.json").read_text())["how"]
    assert how["count"] == 3 and how["how"]["world"]["first_upload"] == 0.6
    cli.dispatch(["data", "tokenizer", config, f"--out={tmp_path / 't.model'}"])
    assert 100 < int(capsys.readouterr().out.split(":")[-1].split()[0]) <= 704
    tokenizer = Tokenizer.load(tmp_path / "t.model")
    assert [tokenizer.id(p) for p in ("<user>", "<bot>", "<eot>", "<soi>", "<image>")] == [4, 5, 6, 7, 8]
    assert tokenizer.id("<loc24>") > 8
    with pytest.raises(ConfigError, match="family 'mm' is unknown"):
        cli.dispatch(["data", "tokenizer", "--family=mm", f"--out={tmp_path / 'u.model'}"])
    with pytest.raises(ConfigError, match="--count=N"):
        cli.dispatch(["data", "synthesize", f"--out={tmp_path / 'e'}"])
    with pytest.raises(ConfigError, match="unknown key; did you mean 'count'"):
        cli.dispatch(["data", "synthesize", config, "--config.world.cuont=3", f"--out={tmp_path / 'e'}"])


# --- chat ---------------------------------------------------------------------------------------------


class Echo:
    """Replies with what it was given: the number of turns and images it saw, and a picture when asked."""

    def __init__(self):
        self.seen = []

    def reply(self, conversations, settings, seeds):
        conversation = conversations[0]
        self.seen.append((conversation, settings, seeds))
        text = conversation.turns[-1].parts[-1].text
        if text == "fail":
            raise DataError("too long")
        parts = [Text(f"{len(conversation.turns)} turns, {len(conversation.images)} images")]
        images = {}
        if text.startswith("draw"):
            ref = f"drawn-{len(conversation.turns)}"
            images = {ref: ImageData.from_array(np.full((3, 4, 3), 9, np.uint8))}
            parts.append(Image(ref))
        return [SimpleNamespace(turn=Turn("assistant", tuple(parts)), images=images, stopped="end")]


@pytest.fixture
def talk(tmp_path):
    out = io.StringIO()
    made = chat.Chat(Echo(), ReplySettings(), tmp_path / "chat", out=out)
    return SimpleNamespace(chat=made, out=out, folder=tmp_path, said=lambda: out.getvalue().splitlines())


def test_a_chat_remembers_draws_and_takes_back(talk):
    chat.run(talk.chat, ["draw a dot", "", "hello", "/undo", "hello again"])
    first = talk.folder / "chat" / "001.png"
    assert talk.said()[:3] == ["1 turns, 0 images", f"[picture: {first}]", "3 turns, 1 images"]
    assert talk.said()[-1] == "3 turns, 1 images", "the undone exchange is gone"
    assert np.array(PIL.Image.open(first)).shape == (3, 4, 3)
    chat.run(talk.chat, ["draw more", "/new", "draw anew"])
    assert (talk.folder / "chat" / "003.png").exists() and talk.said()[-2] == "1 turns, 0 images"


def test_a_chat_shows_pictures_to_the_model(talk):
    path = talk.folder / "mine.png"
    PIL.Image.new("RGBA", (3000, 10), (1, 2, 3, 255)).save(path)
    chat.run(talk.chat, [f"/image {path}", "what is it", "and now"])
    conversation = talk.chat.replier.seen[0][0]
    assert [p.kind for p in conversation.turns[0].parts] == ["image", "text"]
    assert next(iter(conversation.images.values())).width == chat.LARGEST
    assert talk.said()[-2:] == ["1 turns, 1 images", "3 turns, 1 images"], "it is attached once"
    talk.chat.conversation.validate()


def test_seed_and_mode_reach_the_model(talk):
    chat.run(talk.chat, ["hi", "/seed 7", "/mode image", "hi", "/new", "hi", "/new", "/seed -20261122", "hi"])
    seeds = [seeds[0] for _, _, seeds in talk.chat.replier.seen]
    assert len(set(seeds)) == 4 and all(0 <= seed < 2**32 for seed in seeds), "any integer gives 32 bits"
    assert [s.mode for _, s, _ in talk.chat.replier.seen] == ["auto", *["image"] * 3]
    again = chat.Chat(Echo(), ReplySettings(), talk.folder, seed=7, out=io.StringIO())
    chat.run(again, ["hi"])
    assert again.replier.seen[0][2][0] == seeds[2], "the same words and seed repeat"


def test_errors_in_a_chat_are_one_line_and_change_nothing(talk):
    wrong = ["/seed x", "/mode imagine", "/imge x", "/image /none.png", "/save x.txt", "/save x.png"]
    chat.run(talk.chat, ["hi", "fail", *wrong, "/quit", "never said"])
    errors = [line for line in talk.said() if line.startswith("error: ")]
    assert len(errors) == 7 and len(talk.said()) == 8
    assert "did you mean 'image'" in errors[2] and "did you mean 'image'" in errors[3]
    assert len(talk.chat.conversation.turns) == 2
    with pytest.raises(DataError, match="too long"):
        chat.run(talk.chat, ["fail"], stop_on_error=True)


def test_save(talk):
    chat.run(talk.chat, ["draw a dot", f"/save {talk.folder / 'c.json'}", f"/save {talk.folder / 'p.png'}"])
    assert Conversation.from_json((talk.folder / "c.json").read_text()) == talk.chat.conversation
    assert PIL.Image.open(talk.folder / "p.png").size == (4, 3)


def test_pictures_are_previewed_where_they_can_be_seen(talk):
    talk.chat.colour = True
    chat.run(talk.chat, ["draw a dot"])
    assert "\u2580" in talk.out.getvalue() and "[picture: " in talk.said()[-1]


def test_previews_only_where_they_can_be_seen(monkeypatch):
    terminal, pipe = SimpleNamespace(isatty=lambda: True), SimpleNamespace(isatty=lambda: False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    assert grammar.shows_colour(terminal) and not grammar.shows_colour(pipe)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not grammar.shows_colour(terminal)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not grammar.shows_colour(terminal)
