"""The importers of general forms: LLaVA's dialogues, lists of messages, tables, and TensorFlow Datasets."""

import base64
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from importing_toy import (
    all_of,
    causes,
    dialogue,
    make_pictures,
    only,
    picture,
    why,
    write_lines,
    write_list,
    write_parquet,
)

from umm_jax.data.importing import Import
from umm_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("images"))


def rejection(make: Import, index: int = 0) -> tuple[str, str]:
    """(reason, cause) of a record that is rejected, and nothing else made of it."""
    made = make(index)
    assert made.conversation is None
    (reason,) = why(made)["rejected records"]
    (line,) = [line for line in made.tally.quarantine if line["what"] == "record"]
    assert line["reason"] == reason
    return reason, line["cause"]


# Every JSON value that a field is not; None and missing may be allowed, and are tried where they are not.
WRONG = [True, 3, 0.5, "\x00", [3], [[]], [None], {}, {"type": []}, {"bytes": 3, "path": None}]


# --- llava ----------------------------------------------------------------------------------------------


def llava(*values: str, image=None, **rest) -> dict:
    """A dialogue as the release has it: human and gpt in turns."""
    said = [{"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(values)]
    return {
        "id": "000000033471",
        **({} if image is None else {"image": image}),
        "conversations": said,
        **rest,
    }


def test_llava(tmp_path, images):
    entry = llava(
        "<image>\nWhat are the colors of the bus?",
        "White and red.",
        "Is it <b>old</b>?",
        "No.",
        image="b.png",
    )
    record = only(Import("llava", write_list(tmp_path / "a.json", [entry]), images, license="CC-BY-4.0"))
    assert dialogue(record) == [
        ("user", 20, "What are the colors of the bus?"),
        ("assistant", "White and red."),
        ("user", "Is it <b>old</b>?"),
        ("assistant", "No."),
    ]
    assert [turn.op for turn in record.turns] == [None, "ask", None, "ask"]
    assert [turn.depends_on for turn in record.turns] == [(), (), (), (0,)]
    assert [turn.loss for turn in record.turns] == [False, True, False, True]
    assert [dict(turn.meta) for turn in record.turns] == [{"original_id": "000000033471"}, {}, {}, {}]
    assert (record.id, record.source, record.license) == ("llava-a-0", "llava", "CC-BY-4.0")
    assert len(record.images) == 1


def test_llava_of_every_shape(tmp_path, images):
    system = {"from": "system", "value": "Be short."}
    doubled = [
        {"from": "human", "value": "<image>"},
        {"from": "user", "value": "And <image>\n \n<image> now?"},
    ]
    entries = [
        llava("Hi\n", "Hello."),
        llava("Hi", "Hello.", id=7),
        llava("Hi", "Hello.", id=2**70),
        llava("Hi", "Hello.", id=[1]),
        llava("Hi", "Hello.", id=True, image=[], video=None),
        llava("What?\n<image>", "This.", image=["a.png"]),
        {
            "image": ["b.png", "c.png", "b.png"],
            "conversations": [system, *doubled, {"from": "gpt", "value": "x"}],
        },
        llava("Tell.", "That.", "And?", "This.", "<image>", "Oh.", "<image>More", image=["b.png", "c.png"]),
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Ho"}]},
    ]
    make = Import("llava", write_lines(tmp_path / "vlm.jsonl", *entries), images)
    records = all_of(make)
    assert all(records)
    assert dialogue(records[0]) == [("user", "Hi\n"), ("assistant", "Hello.")], "newlines of texts stay"
    assert [turn.op for turn in records[0].turns] == [None, None], "no picture, no question about one"
    ids = [record.turns[0].meta.get("original_id") for record in records]
    assert ids == ["000000033471", 7, str(2**70), None, None, *["000000033471"], None, "000000033471", None]
    assert dialogue(records[5]) == [("user", "What?", 0), ("assistant", "This.")]
    assert dialogue(records[6]) == [
        ("system", "Be short."),
        ("user", 20),
        ("user", "And ", 40, 20, " now?"),
        ("assistant", "x"),
    ]
    assert len(records[6].images) == 2, "a picture shown twice is stored once"
    assert records[6].turns[3].depends_on == (1,), "the request itself is not listed"
    assert dialogue(records[7])[-1] == ("user", 40, "More"), "a last question without an answer is kept"
    assert [turn.depends_on for turn in records[7].turns] == [()] * 7
    assert len({record.to_msgpack() for record in records}) == len(records)


def test_llava_pictures_in_a_list_of_another_name(tmp_path, images):
    one = llava("<image>\nx", "y", image=None) | {"images": ["b.png"]}
    both = llava("<image>\nx", "y", image="b.png") | {"images": ["b.png"]}
    make = Import("llava", write_list(tmp_path / "a.json", [one, both]), images)
    assert dialogue(make(0).conversation)[0] == ("user", 20, "x")
    assert rejection(make, 1)[0] == "pictures given twice"


def test_llava_entries_with_the_same_id_are_all_kept(tmp_path, images):
    entries = [llava("<image>", f"caption {k}", image="a.png") for k in range(3)]
    write_list(tmp_path / "a.json", entries[:2])
    write_lines(tmp_path / "b.jsonl", entries[2])
    records = all_of(Import("llava", tmp_path, images))
    assert len({record.id for record in records}) == 3
    assert [record.turns[1].text for record in records] == ["caption 0", "caption 1", "caption 2"]
    assert {record.turns[0].meta["original_id"] for record in records} == {"000000033471"}


def test_llava_a_picture_without_a_placeholder(tmp_path, images):
    system = {"from": "system", "value": "Be short."}
    entries = [
        llava("What is it?", "A dog.", "Sure?", "Yes.", image="c.png"),
        {"image": "c.png", "conversations": [system, *llava("What?", "It.")["conversations"]]},
        llava("What?", "It.", image=["a.png", "b.png"]),
        llava("What? <image>", "It.", image="a.png"),
        llava("What? <image>", "It."),
    ]
    file = write_list(tmp_path / "a.json", entries)
    strict = Import("llava", file, images)
    unequal = "unequal pictures and placeholders"
    assert rejection(strict, 0) == (unequal, "1 pictures, 0 <image>")
    first = Import("llava", file, images, settings=dict(placeholder="first"))
    assert dialogue(first(0).conversation)[:2] == [("user", 40, "What is it?"), ("assistant", "A dog.")]
    assert first(0).conversation.turns[3].depends_on == (0,)
    assert dialogue(first(1).conversation)[:2] == [("system", "Be short."), ("user", 40, "What?")]
    assert rejection(first, 2) == (unequal, "2 pictures, 0 <image>"), (
        "which of them is meant first is not said"
    )
    assert dialogue(first(3).conversation)[0] == ("user", "What? ", 0)
    assert rejection(first, 4) == (unequal, "0 pictures, 1 <image>")
    with pytest.raises(ConfigError, match="settings.placeholder: 'last' is not allowed"):
        Import("llava", file, images, settings=dict(placeholder="last"))


BROKEN_LLAVA = [
    (dict(id="1"), "field missing", "'conversations' is missing"),
    (dict(conversations={}), "field of another type", "'conversations' must be list, got '{}'"),
    (dict(conversations=[]), "empty dialogue", "0 turns, none from"),
    (dict(conversations=[{"from": "system", "value": "x"}]), "empty dialogue", "1 turns, none from"),
    (dict(conversations=["hi"]), "field missing", "'from' is missing"),
    (dict(conversations=[{"from": "human"}]), "field missing", "'value' is missing"),
    (
        dict(conversations=[{"from": "bot", "value": "x"}]),
        "unknown role",
        "turn 0 is from 'bot'; known: human",
    ),
    (dict(conversations=[{"from": "gpt", "value": "x"}]), "begins with an answer", "the first turn"),
    (llava("Hi"), "no answer", "1 turns, none from an assistant"),
    (llava("<image>", "x"), "unequal pictures and placeholders", "0 pictures, 1 <image>"),
    (
        llava("<image><image>", "x", image="a.png"),
        "unequal pictures and placeholders",
        "1 pictures, 2 <image>",
    ),
    (llava("<image>", "x", image=["a.png", "b.png"]), "unequal pictures and placeholders", "2 pictures, 1"),
    (
        llava("x", "<image>", image="a.png"),
        "placeholder outside a question",
        "turn 1, from 'gpt', has <image>",
    ),
    (llava("<image>", "x", image="gone.png"), "missing picture", "gone.png: no such file"),
    (llava("<image>", "x", image="cut.jpg"), "damaged picture", "cut.jpg: "),
    (llava("<image>", "x", image="../a.png"), "picture outside", "../a.png: leads out"),
    (llava("<image>", "x", image="https://a.org/b.jpg"), "picture by URL", "nothing is fetched"),
    (llava("<image>", "x", image=[3]), "field of another type", "'image' must be a list of strings"),
    (llava("<image>", "x", image={"path": "a.png"}), "field of another type", "'image' must be str or list"),
    (llava("<image>", "", image="a.png"), "empty turn", "turn 1 (assistant) says nothing"),
    (llava("\n", "x"), "empty turn", "turn 0 (user) says nothing"),
    (llava("Hi", "\ud800"), "text that is no Unicode", "half a surrogate pair"),
    (llava("Hi", "x", id="\ud800"), "text that is no Unicode", "half a surrogate pair"),
]


@pytest.fixture(scope="module")
def broken_llava(tmp_path_factory, images) -> Import:
    file = tmp_path_factory.mktemp("llava") / "a.json"
    return Import("llava", write_list(file, [entry for entry, _, _ in BROKEN_LLAVA]), images)


@pytest.mark.parametrize("index", range(len(BROKEN_LLAVA)))
def test_broken_llava(broken_llava, index):
    _, reason, cause = BROKEN_LLAVA[index]
    found = rejection(broken_llava, index)
    assert found[0] == reason and cause in found[1]


def test_llava_videos_are_left_out(tmp_path, images):
    file = write_list(tmp_path / "a.json", [llava("<video>", "x", video="a.mp4")])
    assert why(Import("llava", file, images)(0)) == {"left out": {"videos": 1}}


def test_llava_with_any_value_in_any_field(tmp_path, images):
    entries = []
    for value in [*WRONG, None]:
        entries += [
            {**llava("Hi", "x"), "conversations": value},
            {**llava("Hi", "x"), "conversations": [value, {"from": "gpt", "value": "x"}]},
            {**llava("Hi", "x"), "conversations": [{"from": value, "value": "x"}]},
            {**llava("Hi", "x"), "conversations": [{"from": "human", "value": value}]},
        ]
        if value is not None:
            entries.append(llava("<image>", "x", image=value))
    make = Import("llava", write_lines(tmp_path / "a.jsonl", *entries), images)
    assert [rejection(make, k) for k in range(len(make))]


# --- messages -------------------------------------------------------------------------------------------


def chat(*messages: tuple, **rest) -> dict:
    """Messages as (role, content) or whole."""
    said = [{"role": m[0], "content": m[1]} if isinstance(m, tuple) else m for m in messages]
    return {"messages": said, **rest}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def url(name: str) -> dict:
    return {"type": "image_url", "image_url": {"url": name}}


def encoded(grey: int) -> str:
    return base64.b64encode(picture(grey)).decode()


def source(**rest) -> dict:
    return {"type": "image", "source": rest}


def test_messages_of_the_form_of_openai(tmp_path, images):
    """The recipe of a folder with chat.jsonl and photos."""
    entry = chat(
        ("developer", "Be short."),
        ("user", [url("c.png"), text("What is this?")]),
        ("assistant", "Grey."),
        ("user", [text("And this, beside "), {"type": "image_url", "image_url": "c.png"}, text("?")]),
        ("assistant", [text("The same.")]),
        ("user", [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(60)}"}}]),
        {"role": "assistant", "content": "Lighter.", "weight": 0, "refusal": None, "tool_calls": None},
        {"role": "assistant", "content": "Sorry: darker.", "weight": 1},
    )
    record = only(Import("messages", write_lines(tmp_path / "chat.jsonl", entry), images, license="CC0-1.0"))
    assert dialogue(record) == [
        ("system", "Be short."),
        ("user", 40, "What is this?"),
        ("assistant", "Grey."),
        ("user", "And this, beside ", 40, "?"),
        ("assistant", "The same."),
        ("user", 60),
        ("assistant", "Lighter."),
        ("assistant", "Sorry: darker."),
    ]
    assert [turn.depends_on for turn in record.turns] == [(), (), (), (), (1,), (), (1, 3), (1, 3, 5)]
    assert [turn.loss for turn in record.turns] == [False, False, True, False, True, False, False, True]
    assert {turn.op for turn in record.turns} == {None}
    assert len(record.images) == 2, "each picture is stored once"
    assert (record.id, record.license) == ("messages-chat-1", "CC0-1.0")


def test_messages_of_the_form_of_anthropic(tmp_path, images):
    shown = [source(type="base64", media_type="image/jpeg", data=encoded(20)), text("This?")]
    entries = [
        chat(("user", shown), ("assistant", [text("A square.")]), system="Be kind."),
        chat(("user", "Hi"), ("assistant", "Ho"), system=[text("Be "), text("kind.")]),
        chat(("user", [source(type="url", url="d.png"), text("?")]), ("assistant", "A square."), system=None),
    ]
    records = all_of(Import("messages", write_list(tmp_path / "a.json", entries), images))
    first = [("system", "Be kind."), ("user", 20, "This?"), ("assistant", "A square.")]
    assert dialogue(records[0]) == first
    assert dialogue(records[1]) == [("system", "Be ", "kind."), ("user", "Hi"), ("assistant", "Ho")]
    assert dialogue(records[2])[0] == ("user", 60, "?")


def test_messages_of_chat_templates(tmp_path, images):
    nothing = {"text": None, "index": None}
    first = [{"type": "image", **nothing}, {"type": "image", "text": None, "index": 1}, text("Which?")]
    a, b = [text("a")], [text("b")]
    entry = chat(("user", first), ("assistant", a), ("user", [{"type": "image"}]), ("assistant", b))
    entries = [
        {**entry, "images": ["b.png", "c.png", f"data:image/png;base64,{encoded(80)}"]},
        chat(
            ("user", [{"type": "image", "path": "d.png"}, {"type": "image", "image": "b.png"}]),
            ("assistant", "x"),
        ),
        chat(("user", [{"type": "image", "url": "c.png"}]), ("assistant", "x"), images=[]),
    ]
    records = all_of(Import("messages", write_lines(tmp_path / "a.jsonl", *entries), images))
    said = [("user", 20, 40, "Which?"), ("assistant", "a"), ("user", 80), ("assistant", "b")]
    assert dialogue(records[0]) == said
    assert dialogue(records[1])[0] == ("user", 60, 20) and dialogue(records[2])[0] == ("user", 40)
    pytest.importorskip("pyarrow")
    rows = [{**entry, "images": [{"bytes": picture(grey), "path": "/x.png"} for grey in (20, 40, 80)]}]
    assert dialogue(only(Import("messages", write_parquet(tmp_path / "a.parquet", rows)))) == said


def test_messages_with_marks_in_their_texts(tmp_path, images):
    """The form of LLaMA-Factory, where pictures of answers are marked in the same way."""
    marked = chat(
        ("user", "<image>\nWhich of these? <image>"),
        ("assistant", "The first. Lighter:<image>"),
        images=["b.png", "c.png", "d.png"],
    )
    typed = chat(
        ("user", [{"type": "image"}, text("what is <image> for")]), ("assistant", "x"), images=["b.png"]
    )
    plain = chat(("user", "what is <image> for"), ("assistant", "x"))
    few = chat(("user", "<image><image>"), ("assistant", "x"), images=["b.png"])
    path = write_lines(tmp_path / "a.jsonl", marked, typed, plain, few)
    make = Import("messages", path, images)
    found = [make(k).conversation for k in range(3)]
    assert dialogue(found[0]) == [
        ("user", 20, "Which of these? ", 40),
        ("assistant", "The first. Lighter:", 60),
    ]
    assert dialogue(found[1])[0][1] == 20 and len(dialogue(found[1])[0]) == 3, "a word, not a place"
    assert len(dialogue(found[2])[0]) == 2
    assert rejection(make, 3)[0] == "unequal pictures and placeholders"


def test_messages_with_pictures_that_an_assistant_drew(tmp_path, images):
    drawn = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(60)}"}}
    entry = chat(
        ("user", "Draw a square."),
        {"role": "assistant", "content": "Here:", "images": [drawn]},
        ("user", "Darker, please."),
        {"role": "assistant", "content": None, "images": [url("b.png")]},
        ("user", "Thanks."),
        {"role": "assistant", "content": "Welcome.", "images": []},
        ("user", "Again."),
        ("assistant", [text("So:"), url("a.png")]),
    )
    record = only(Import("messages", write_lines(tmp_path / "a.jsonl", entry), images))
    assert dialogue(record)[1::2] == [
        ("assistant", "Here:", 60),
        ("assistant", 20),
        ("assistant", "Welcome."),
        ("assistant", "So:", 0),
    ]
    assert [turn.depends_on for turn in record.turns[1::2]] == [(), (1,), (1, 3), (1, 3)]


def test_messages_with_tools(tmp_path, images):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    entries = [
        chat(("user", "x"), {"role": "assistant", "content": None, "tool_calls": [call]}, ("tool", "3")),
        chat(("user", "x"), {"role": "tool", "tool_call_id": "1", "content": "3"}),
        chat(("user", "x"), ("assistant", [{"type": "tool_use", "id": "1", "name": "f", "input": {}}])),
        chat(("user", [{"type": "tool_result", "tool_use_id": "1", "content": "3"}])),
    ]
    file = write_lines(tmp_path / "a.jsonl", *entries)
    make = Import("messages", file, images)
    assert [rejection(make, k)[0] for k in range(4)] == ["use of tools"] * 4
    assert [rejection(make, k)[1].split(";")[0] for k in range(4)] == [
        "messages[1]: an assistant that calls a tool",
        "messages[1]: role 'tool'",
        "messages[1].content[0]: a part of type 'tool_use'",
        "messages[0].content[0]: a part of type 'tool_result'",
    ]
    make = Import("messages", file, images, settings=dict(tools="leave_out"))
    assert [why(make(k)) for k in range(4)] == [{"left out": {"chats with tools": 1}}] * 4
    with pytest.raises(ConfigError, match="settings.tools: 'keep' is not allowed"):
        Import("messages", file, images, settings=dict(tools="keep"))


ANSWER = ("assistant", "x")
BROKEN_MESSAGES = [
    ({"conversations": []}, "field missing", "'messages' is missing"),
    (chat(), "empty dialogue", "no message of a user"),
    (chat(("system", "x")), "empty dialogue", "no message of a user"),
    (chat(("user", "x")), "no answer", "1 messages, none of an assistant"),
    (chat(("user", "x"), "hi"), "field missing", "messages[1]: 'role' is missing"),
    (chat(("user", "x"), {"role": "assistant"}), "field missing", "messages[1]: 'content' is missing"),
    (chat(("user", "x"), ("assistant", None)), "field of another type", "messages[1]: 'content' must be str"),
    (chat(("human", "x"), ANSWER), "unknown role", "messages[0]: role 'human'; known: system, developer"),
    (chat(("user", ""), ANSWER), "empty turn", "messages[0]: turn 0 (user) says nothing"),
    (chat(("user", []), ANSWER), "empty turn", "messages[0]: turn 0 (user) says nothing"),
    (chat(("user", "x"), ("assistant", "\0")), "text with NUL", "messages[1]: a NUL at letter 0"),
    (chat(("user", [text("x"), "y"]), ANSWER), "field missing", "messages[0].content[1]: 'type' is missing"),
    (
        chat(("user", [{"type": "text"}]), ANSWER),
        "field missing",
        "messages[0].content[0]: 'text' is missing",
    ),
    (
        chat(("user", [{"type": "input_audio", "input_audio": {}}]), ANSWER),
        "unknown part",
        "messages[0].content[0]: type 'input_audio'; known: text, image_url, image",
    ),
    (
        chat(("user", [{"type": "image_url", "image_url": {}}]), ANSWER),
        "field missing",
        "messages[0].content[0]: 'url' is missing",
    ),
    (
        chat(("user", [{"type": "image", "base64": "eA=="}]), ANSWER, images=["a.png"]),
        "unknown part",
        "messages[0].content[0]: a picture by 'base64'; known: source, image, path, url",
    ),
    (
        chat(("user", [{"type": "image", "path": "a.png", "url": "a.png"}]), ANSWER),
        "unknown part",
        "messages[0].content[0]: a picture given twice, by 'path' and 'url'",
    ),
    (chat(("user", [source(type="file", file_id="f")]), ANSWER), "unknown part", "a source of type 'file'"),
    (chat(("user", [source(type="base64")]), ANSWER), "field missing", "messages[0].content[0]: 'data' is"),
    (
        chat(("user", [source(type="base64", data="?")]), ANSWER),
        "damaged picture",
        "messages[0].content[0]: a data URL: not base64",
    ),
    (
        chat(("user", "x"), ANSWER, ("user", [text("And"), url("gone.png")]), ANSWER),
        "missing picture",
        "messages[2].content[1]: gone.png: no such file",
    ),
    (
        chat(("user", [url("https://a.org/b.png")]), ANSWER),
        "picture by URL",
        "messages[0].content[0]: https:",
    ),
    (chat(("user", [url("file:///etc/passwd")]), ANSWER), "picture by URL", "messages[0].content[0]: file:"),
    (chat(("user", [url("cut.jpg")]), ANSWER), "damaged picture", "messages[0].content[0]: cut.jpg: "),
    (
        chat(("user", "x"), {"role": "assistant", "content": "", "images": [url("gone.png")]}),
        "missing picture",
        "messages[1].images[0]: gone.png",
    ),
    (
        chat({"role": "user", "content": "x", "images": ["eA=="]}, ANSWER),
        "unknown part",
        "messages[0]: 'images' of a message by 'user'",
    ),
    (
        chat(("user", [{"type": "image"}]), ANSWER),
        "unequal pictures and placeholders",
        "0 in the list 'images', 1 parts",
    ),
    (chat(("user", "x"), ANSWER, images=["a.png"]), "unequal pictures and placeholders", "1 in the list"),
    (
        chat(
            ("user", [{"type": "image", "index": 1}, {"type": "image", "index": 0}]),
            ANSWER,
            images=["a", "b"],
        ),
        "index out of range",
        "messages[0].content[0]: 'index' is 1, it is picture 0 of the chat",
    ),
    (chat(("user", [{"type": "image"}]), ANSWER, images=[3]), "no picture", "messages[0].content[0]: "),
    (
        chat(("user", "x"), {"role": "assistant", "content": "x", "weight": 0.5}),
        "unknown weight",
        "messages[1]: 'weight' must be 0 or 1, of an assistant's message, got '0.5'",
    ),
    (chat({"role": "user", "content": "x", "weight": 1}, ANSWER), "unknown weight", "messages[0]: 'weight'"),
    (chat(("user", "x"), ANSWER, system=3), "field of another type", "'system' must be str or list"),
    (chat(("user", "x"), ANSWER, system=[{}]), "field missing", "system[0]: 'type' is missing"),
    (chat(("user", "x"), ANSWER, system=""), "empty turn", "system: turn 0 (system) says nothing"),
]


@pytest.fixture(scope="module")
def broken_messages(tmp_path_factory, images) -> Import:
    file = tmp_path_factory.mktemp("messages") / "a.jsonl"
    return Import("messages", write_lines(file, *(entry for entry, _, _ in BROKEN_MESSAGES)), images)


@pytest.mark.parametrize("index", range(len(BROKEN_MESSAGES)))
def test_broken_messages(broken_messages, index):
    _, reason, cause = BROKEN_MESSAGES[index]
    found = rejection(broken_messages, index)
    assert found[0] == reason and cause in found[1]


def test_messages_with_any_value_in_any_field(tmp_path, images):
    entries = []
    for value in [*WRONG, None]:
        entries += [
            {"messages": value},
            chat(("user", "x"), {"role": value, "content": "x"}),
            chat(("user", value), ANSWER),
            *(
                chat(("user", [part]), ANSWER)
                for part in (value, {"type": value}, {"type": "text", "text": value})
            ),
            chat(("user", [{"type": "image_url", "image_url": value}]), ANSWER),
            chat(("user", [url(value)]), ANSWER),
            chat(("user", [{"type": "image", "source": value}]), ANSWER),
            chat(("user", [{"type": "image", "image": value}]), ANSWER),
            chat(("user", [source(type=value)]), ANSWER),
            chat(("user", [source(type="base64", data=value)]), ANSWER),
            chat(("user", [{"type": "image"}]), ANSWER, images=value),
            chat(("user", [{"type": "image"}]), ANSWER, images=[value]),
        ]
        if value is not None:
            entries.append(chat(("user", "x"), {"role": "assistant", "images": value}))
    # Texts and lists of nothing are contents that say nothing, so that none of these is a record.
    make = Import("messages", write_lines(tmp_path / "a.jsonl", *entries), images)
    assert [rejection(make, k) for k in range(len(make))]


# --- table ----------------------------------------------------------------------------------------------

ASKED = dict(user="{image} What is this?", assistant="A {label}.")


def stored(grey: int) -> dict:
    """A picture as the datasets library writes it."""
    return {"bytes": picture(grey), "path": "../7.jpg"}


def test_tables_of_the_datasets_library(tmp_path, images):
    pyarrow = pytest.importorskip("pyarrow")
    rows = [{"image": stored(20 * k), "label": k, "score": 0.5 * k} for k in range(3)]
    labels = {"label": ["cat", "dog", "cow"]}
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows)
    make = Import("table", tmp_path, settings=dict(**ASKED, labels=labels, op="ask"), license="MIT")
    records = all_of(make)
    assert [dialogue(record) for record in records] == [
        [("user", 20 * k, "What is this?"), ("assistant", f"A {name}.")]
        for k, name in enumerate(("cat", "dog", "cow"))
    ]
    assert [(turn.op, turn.depends_on, turn.loss) for turn in records[0].turns] == [
        (None, (), False),
        ("ask", (), True),
    ]
    assert records[1].id == "table-train-00000-of-00001-1" and records[1].license == "MIT"
    # The same, saved by save_to_disk: beside it lie JSON files and tables that are no data.
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(rows)
    for name in ("data-00000-of-00001.arrow", "cache-1f.arrow"):
        with (
            pyarrow.OSFile(str(folder / name), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table)
    (folder / "state.json").write_text("{}")
    make = Import("table", folder, settings=dict(document="{score} of 1: {image}{image}", op="describe"))
    assert [dialogue(record) for record in all_of(make)] == [
        [("document", f"{score} of 1:", 20 * k, 20 * k)] for k, score in enumerate((0.0, 0.5, 1.0))
    ]
    assert make(0).conversation.turns[0].op == "describe" and make(0).conversation.turns[0].loss
    assert len(make(0).conversation.images) == 1


def test_tables_of_lines_and_their_templates(tmp_path, images):
    row = {
        "image": "b.png",
        "more": ["c.png", "d.png"],
        "the text": " hi {x}\n",
        "n": 3,
        "x": 0.1,
        "ok": True,
    }
    file = write_lines(tmp_path / "a.jsonl", row)

    def laid(template: str, **settings) -> tuple:
        return dialogue(only(Import("table", file, images, settings=dict(document=template, **settings))))[0][
            1:
        ]

    assert laid("{image}", pictures=["image"]) == (20,)
    assert laid("{image}") == ("b.png",), "a text unless it is said to name a picture"
    assert laid("{{{n}}} and\n{x} {the text}") == ("{3} and\n0.1  hi {x}",)
    assert laid(" see {more}, {image}\n", pictures=["more", "image"]) == ("see", 40, 60, ",", 20)
    assert laid("{ok}", labels={"ok": ["no", "yes"]}) == ("yes",)
    drawn = dict(user="Draw {n}", assistant="{image}", op="draw", pictures=["image"])
    record = only(Import("table", file, images, settings=drawn))
    assert dialogue(record) == [("user", "Draw 3"), ("assistant", 20)] and record.turns[1].op == "draw"


def test_tables_of_webdataset(tmp_path):
    file = tmp_path / "0.tar"
    with tarfile.open(file, "w") as tar:
        for name, data in {
            "a/1.jpg": picture(0, "JPEG"),
            "a/1.txt": "Café\n".encode(),
            "a/1.cls": b"1\n",
            "a/2.jpg": picture(0, "JPEG"),
            "a/2.txt": b"caf\xe9",
            "a/2.cls": b"one",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    settings = dict(user="{jpg}Which?", assistant="{cls}: {txt}", labels={"cls": ["tea", "coffee"]})
    make = Import("table", tmp_path, settings=settings)
    assert dialogue(make(0).conversation) == [("user", 0, "Which?"), ("assistant", "coffee: Café")]
    assert rejection(make, 1) == ("field of another type", "'cls' must be a class, got \"b'one'\"")
    make = Import("table", file, settings=dict(document="{jpg} {txt}"))
    assert rejection(make, 1)[0] == "text that is no Unicode"
    make = Import("table", file, settings=dict(document="{jpg} {cls}", texts=["cls"]))
    assert dialogue(make(0).conversation) == [("document", 0, "1")]
    assert rejection(Import("table", file, settings=dict(document="{cls}")))[0] == "no picture"


@pytest.mark.parametrize(
    "row, template, settings, reason, cause",
    [
        ({}, "{a}", {}, "field missing", "'a' is missing"),
        ({"a": None}, "{a}", {}, "field of another type", "'a' must be str or int or float"),
        ({"a": ""}, " {a}", {}, "empty turn", "turn 0 (document) says nothing"),
        ({"a": True}, "{a}", {}, "field of another type", "got True; 'labels' puts words for it"),
        ({"a": 3}, "{a}", {"pictures": ["a"]}, "field of another type", "'a' must be pictures, got '3'"),
        ({"a": ["x", "y"]}, "{a}", {}, "field of another type", "'pictures' lists columns of names"),
        ({"a": ["a.png", 3]}, "{a}", {"pictures": ["a"]}, "field of another type", "'a' must be pictures"),
        ({"a": []}, "{a}", {"pictures": ["a"]}, "missing picture", "'a' is a list of no pictures"),
        ({"a": []}, "{a}", {}, "missing picture", "'a' is a list of no pictures"),
        ({"a": {}}, "{a}", {}, "no picture", "expected a name or bytes, got dict"),
        ({"a": {"bytes": None, "path": "gone.png"}}, "{a}", {}, "missing picture", "no such file"),
        ({"a": {"bytes": None, "path": "/etc/hostname"}}, "{a}", {}, "picture outside", "leads out"),
        ({"a": "gone.png"}, "{a}", {"pictures": ["a"]}, "missing picture", "gone.png: no such file"),
        (
            {"a": 2},
            "{a}",
            {"labels": {"a": ["x", "y"]}},
            "index out of range",
            "'a' is 2, there are 2 labels",
        ),
        ({"a": -1}, "{a}", {"labels": {"a": ["x", "y"]}}, "index out of range", "'a' is -1"),
        (
            {"a": "x"},
            "{a}",
            {"labels": {"a": ["x"]}},
            "field of another type",
            "'a' must be a class, got 'x'",
        ),
        ({"a": 1.0}, "{a}", {"labels": {"a": ["x", "y"]}}, "field of another type", "'a' must be a class"),
        ({"a": 10**400}, "{a}", {"labels": {"a": ["x"]}}, "index out of range", "there are 1 labels"),
        ({"a": "1e999"}, "{b}", {}, "field missing", "'b' is missing"),
    ],
)
def test_broken_rows(tmp_path, images, row, template, settings, reason, cause):
    file = write_lines(tmp_path / "a.jsonl", row)
    found = rejection(Import("table", file, images, settings=dict(document=template, **settings)))
    assert found[0] == reason and cause in found[1]


def test_numbers_that_are_none(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", '{"a": 1e999}\n')
    assert rejection(Import("table", file, settings=dict(document="{a}")))[0] == "field of another type"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(), "give the templates user and assistant, or document alone; given: none"),
        (dict(user="{a}"), "given: user"),
        (dict(user="{a}", assistant="{b}", document="{c}"), "given: assistant, document, user"),
        (dict(document="x"), "no template has a column in braces"),
        (dict(document="{a.b}"), "document='{a.b}': only names of columns go into braces"),
        (dict(document="{a[0]}"), "only names of columns"),
        (dict(document="{a!r}"), "only names of columns"),
        (dict(user="{a:>3}", assistant="x"), "user='{a:>3}': only names of columns"),
        (dict(document="{}"), "braces without the name of a column"),
        (dict(document="{a"), "document='{a' is no template: expected '}'"),
        (dict(document="a}"), "is no template: Single '}'"),
        (dict(document="{a}", pictures=["b"]), "pictures: 'b' stands in no template"),
        (dict(document="{a}", labels={"b": ["x"]}), "labels: 'b' stands in no template"),
        (dict(document="{a}", pictures=["a"], labels={"a": ["x"]}), "'a' stands in pictures and in labels"),
        (dict(document="{a}", labels={"a": "xy"}), "labels.a: expected a list"),
    ],
)
@pytest.mark.parametrize("kind", ["table", "tfds"])
def test_templates_are_checked(tmp_path, kind, settings, message):
    with pytest.raises(ConfigError) as error:
        Import(kind, write_lines(tmp_path / "a.jsonl", {}), settings=settings)
    assert message in str(error.value)


# --- tfds -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A data set of three examples as tfds prepares it; the folder of its version."""
    tfds = pytest.importorskip("tensorflow_datasets")
    features = tfds.features

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            columns = {
                "image": features.Image(),
                "frames": features.Sequence(features.Image()),
                "plain": features.Scalar(np.object_),
                "question": features.Text(),
                "label": features.ClassLabel(names=["cat", "dog"]),
                "unnamed": features.ClassLabel(num_classes=4),
                "score": features.Scalar(np.float32),
                "tame": features.Scalar(np.bool_),
                "about": {"place": features.Text()},
                "answers": features.Sequence({"text": features.Text()}),
            }
            return tfds.core.DatasetInfo(builder=self, features=features.FeaturesDict(columns))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(), "test": self._generate_examples()}

        def _generate_examples(self):
            for k in range(3):
                yield (
                    k,
                    {
                        "image": io.BytesIO(picture(20 * k)),
                        "frames": [io.BytesIO(picture(20 * i)) for i in range(k)],
                        "plain": picture(100, "BMP") if k < 2 else b"\xff\xfe",
                        "question": f"Wäs {k}?",
                        "label": (0, 1, -1)[k],
                        "unnamed": k,
                        "score": 0.1,
                        "tame": k == 1,
                        "about": {"place": "home"},
                        "answers": [{"text": "x"}],
                    },
                )

    builder = Pets(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def by_question(make: Import) -> dict[str, list]:
    """The dialogues by their question; tfds shuffles."""
    found = {}
    for record in all_of(make):
        if record is not None:
            (number,) = [c for c in record.turns[0].text if c.isdigit()]
            found[int(number)] = dialogue(record)
    return found


def test_tfds(prepared):
    settings = dict(user="{image} {question}", assistant="{unnamed}, {score}, {about/place}", op="ask")
    make = Import("tfds", prepared, settings=settings, license="CC0-1.0")
    assert len(make) == 3
    assert by_question(make) == {
        k: [("user", 20 * k, f"Wäs {k}?"), ("assistant", f"{k}, 0.1, home")] for k in range(3)
    }
    first = make(0).conversation
    assert (first.id, first.license, first.turns[1].op) == ("tfds-pets-train-0", "CC0-1.0", "ask")
    again = pickle.loads(pickle.dumps(make))
    assert [again(k).conversation for k in range(3)] == all_of(make), "worker processes get the same"
    assert len(pickle.dumps(make.entries)) < 1000, "they open the files themselves"
    with pytest.raises(IndexError):
        make.entries[3]
    test = Import("tfds", prepared, settings={**settings, "split": "test[:2]"})
    assert len(test) == 2 and test.recipe()["annotations"] != make.recipe()["annotations"]
    assert again.recipe() == make.recipe() and make.recipe()["annotations"].startswith("3 examples, ")


def test_tfds_pictures_that_are_bytes_or_lists(prepared):
    make = Import("tfds", prepared, settings=dict(document="{question}{plain}", pictures=["plain"]))
    assert by_question(make) == {k: [("document", f"Wäs {k}?", 100)] for k in (0, 1)}
    no_picture = {"rejected pictures": {"no picture": 1}, "rejected records": {"no picture": 1}}
    assert no_picture in [why(make(k)) for k in range(3)]
    make = Import("tfds", prepared, settings=dict(document="{question}{frames}"))
    assert by_question(make) == {1: [("document", "Wäs 1?", 0)], 2: [("document", "Wäs 2?", 0, 20)]}
    assert ["'frames' is a list of no pictures"] in [causes(make(k)) for k in range(3)]
    make = Import("tfds", prepared, settings=dict(document="{plain}"))
    assert [rejection(make, k)[0] for k in range(3)] == ["text that is no Unicode"] * 3
    make = Import("tfds", prepared, settings=dict(document="{answers/text}"))
    reason, cause = rejection(make)
    assert reason == "field of another type" and "'answers/text' must be pictures" in cause
    assert rejection(Import("tfds", prepared, settings=dict(document="{nothing}")))[0] == "field missing"


def test_tfds_classes_are_words(prepared):
    named = Import("tfds", prepared, settings=dict(document="{question} {label}"))
    assert by_question(named) == {0: [("document", "Wäs 0? cat")], 1: [("document", "Wäs 1? dog")]}
    rejected = [why(named(k)) for k in range(3)]
    assert {"rejected records": {"field of another type": 1}} in rejected, "-1 is a class that is unknown"
    labels = {"label": ["Katze", "Hund"], "unnamed": ["a", "b", "c", "d"], "tame": ["wild", "tame"]}
    make = Import(
        "tfds", prepared, settings=dict(document="{question} {label} {unnamed} {tame}", labels=labels)
    )
    assert by_question(make) == {
        0: [("document", "Wäs 0? Katze a wild")],
        1: [("document", "Wäs 1? Hund b tame")],
    }
    assert {"rejected records": {"index out of range": 1}} in [why(make(k)) for k in range(3)]
    assert "got True; 'labels'" in "".join(
        rejection(Import("tfds", prepared, settings=dict(document="{tame}")), k)[1] for k in range(3)
    )


@pytest.mark.parametrize("split", ["nope", "train[:x]", "", "train[1:500]", "train[:0]", "train+nope"])
def test_tfds_splits_that_are_none(prepared, split):
    with pytest.raises(ConfigError, match=r"is no part of train, test"):
        Import("tfds", prepared, settings=dict(document="{question}", split=split))


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def _damage(folder: Path) -> None:
    for file in folder.glob("*.array_record*"):
        file.write_bytes(b"\0" * file.stat().st_size)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "features.json").unlink(), "its features.json cannot be read"),
        (lambda f: (f / "dataset_info.json").unlink(), "no prepared data set that can be read"),
        (lambda f: (f / "features.json").write_text("{"), "its features.json cannot be read"),
        (lambda f: (f / "features.json").write_text("[" * 100_000), "its features.json cannot be read"),
        (lambda f: (f / "features.json").write_text("[]"), "no prepared data set that can be read"),
        (
            lambda f: _replace(f / "dataset_info.json", "array_record", "tfrecord"),
            "not array_record; prepare it",
        ),
        (
            lambda f: _replace(
                f / "features.json", "tensorflow_datasets.core.features.text_feature.", "evil."
            ),
            "a feature of class 'evil.Text', whose code is not run",
        ),
        (
            lambda f: (f / "features.json").write_text(json.dumps([{"json": '{"type": "evil.Text"}'}])),
            "a feature of class 'evil.Text'",
        ),
        (_damage, "cannot be read"),
        (lambda f: [p.unlink() for p in f.glob("*.array_record*")], "cannot be read"),
    ],
)
def test_tfds_folders_that_are_none(prepared, tmp_path, change, message):
    folder = tmp_path / "1.0.0"
    shutil.copytree(prepared, folder)
    change(folder)
    with pytest.raises(DataError, match="1.0.0.*: ") as error:
        Import("tfds", folder, settings=dict(document="{question}"))(0)
    assert message in str(error.value)


def test_tfds_without_its_library(prepared, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ConfigError, match="need tensorflow-datasets: pip install tensorflow-datasets"):
        Import("tfds", prepared, settings=dict(document="{question}"))
