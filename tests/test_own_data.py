"""The recipe of docs/data.md for a folder of chats and photographs, from import to training."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from test_data_report import photograph

from umm_jax import cli
from umm_jax.data.records import open_source
from umm_jax.data.tokenizer import Tokenizer

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "own_data.py"
GUIDE = (HERE.parent / "docs" / "data.md").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Photographs of several sizes, and chats that show and draw them."""
    (tmp_path / "photos").mkdir()
    for k, (height, width) in enumerate(((200, 300), (300, 200), (128, 128), (90, 160))):
        pixels = np.asarray(PIL.Image.fromarray(photograph(k)).resize((width, height)))
        PIL.Image.fromarray(pixels).save(tmp_path / "photos" / f"{k}.jpg", quality=90)
    chats = []
    for k in range(40):
        shown = {"type": "image_url", "image_url": {"url": f"{k % 4}.jpg"}}
        seen = [{"role": "user", "content": [shown, {"type": "text", "text": "What is this?"}]}]
        seen.append({"role": "assistant", "content": f"Colours, number {k % 4}."})
        drawn = [{"role": "user", "content": f"Draw colours, number {k % 4}."}]
        drawn.append({"role": "assistant", "content": [{"type": "text", "text": "Here."}, shown]})
        chats.append(json.dumps({"messages": (seen, drawn, seen + drawn)[k % 3]}))
    (tmp_path / "chats.jsonl").write_text("\n".join(chats) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe() -> list[list[str]]:
    """The commands of the guide, without `umm`."""
    text = GUIDE.split("## Your own data")[1].split("```")[3]
    return [line.split()[1:] for line in text.splitlines() if line.startswith("umm ")]


def test_the_recipe(folder, capsys):
    commands = recipe()
    assert [words[:2] for words in commands[:3]] == [
        ["data", name] for name in ("import", "stats", "tokenizer")
    ]
    assert commands[3][0] == "train" and len(commands) == 5 and commands[4][0] == "chat"
    at = [word.replace("configs/own_data.py", str(CONFIG)) for word in commands[3]]
    small = ["steps=2", "save_every=2", "log_every=1"]
    small = [f"--config.train.{value}" for value in small]
    model = dict(layers=2, width=32, heads=2, kv_heads=2, mlp=64)
    small += [f"--config.model.mixture.{key}={value}" for key, value in model.items()]
    for words in commands[:3]:
        assert cli.main([w.replace("configs/own_data.py", str(CONFIG)) for w in words]) == 0
    source = open_source("data/own")
    assert len(source) == 40 and all(len(r.images) == 1 for r in source)
    assert source.conversation(0).images["i0"].data == (folder / "photos" / "0.jpg").read_bytes()
    capsys.readouterr()
    assert cli.main(["data", "stats", "data/own", f"--config={CONFIG}", "--limit=20"]) == 0
    found = json.loads(capsys.readouterr().out)["rows of this config"]
    assert found["binding"] == "images" and found["images_filled"] > 0.9
    tokenizer = Tokenizer.load("data/own.model")
    assert tokenizer.decode(tokenizer.encode("Draw colours, number 3.")) == "Draw colours, number 3."
    assert cli.main([*at, *small]) == 0
    assert "done      2 steps" in capsys.readouterr().err
