"""Chats as lists of messages, as the APIs of OpenAI and Anthropic and chat templates have them.

    {"messages": [
      {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "photos/cat.jpg"}},
                                   {"type": "text", "text": "What is this?"}]},
      {"role": "assistant", "content": "A cat."}]}

A line of JSON, an element of a list or a row is a chat. `content` is a text, or parts in their order. Forms
of a picture, where NAME is a name below the folder of pictures, or a data: URL:

    {"type": "image_url", "image_url": NAME or {"url": NAME}}                               OpenAI
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "..."}}    Anthropic
    {"type": "image", "source": {"type": "url", "url": NAME}}
    {"type": "image"}, the next of the list `images` of the chat; its "index" is checked    Hugging Face
    {"type": "image", "image": NAME}, and likewise "path" or "url"
    "<image>" in a text, the next of the list `images` of a chat that has no such parts  LLaMA-Factory

Pictures that an assistant draws stand among its parts, or as servers of such models answer in a list `images`
of its message, {"type": "image_url", ...} each; these come after the text. Besides: "developer" is a system
message, so is Anthropic's `system` beside the messages; `weight` 0 says that an assistant's message is not to
be learned. A cause names its place as in Python: messages[2].content[0].
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from umm_jax.conversation import Image
from umm_jax.data.entries import Entries
from umm_jax.data.importing import Draft, want
from umm_jax.data.quarantine import LeftOut, Rejected

VERSION = 1
LICENSE = ""
_MARK = "<image>"
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_CALLS = ("tool_calls", "function_call")  # of a message
_TOOLS = ("tool", "function", "tool_use", "tool_result")  # roles, and types of parts
_FORMS = ("source", "image", "path", "url")  # what a part of type "image" may be given by


@dataclass(frozen=True)
class Settings:
    """What becomes of chats that no record can hold.

    Attributes:
        tools: chats with calls of tools or their answers: "reject", or "leave_out".
    """

    tools: Literal["reject", "leave_out"] = "reject"


def entries(path: Path, settings: Settings) -> Entries:
    return Entries(path, ("*.jsonl", "*.json", "*.parquet"))


class _Part(NamedTuple):
    """What stands at a place of the entry: "text", "picture", or "next", the next picture of its list."""

    where: str
    kind: str
    value: Any = None


class _Message(NamedTuple):
    where: str
    role: str
    parts: list[_Part]
    loss: bool | None = None


def conversation(
    entry: Mapping[str, Any], settings: Settings, rng: np.random.Generator, draft: Draft
) -> None:
    """The messages as turns, their parts in order."""
    said = []
    if entry.get("system") is not None:
        said.append(
            _Message("system", "system", _parts(want(entry, "system", (str, list)), "system", settings))
        )
    for k, message in enumerate(want(entry, "messages", list)):
        said.append(_message(message, f"messages[{k}]", settings))
    roles = {message.role for message in said}
    if not roles - {"system"}:
        raise Rejected("empty dialogue", "no message of a user or an assistant")
    if "assistant" not in roles:
        raise Rejected("no answer", f"{len(said)} messages, none of an assistant")
    listed = [] if entry.get("images") is None else want(entry, "images", list)
    if listed and not any(part.kind == "next" for message in said for part in message.parts):
        said = [message._replace(parts=_marked(message.parts)) for message in said]
    places = [part for message in said for part in message.parts if part.kind == "next"]
    if len(places) != len(listed):
        cause = (
            f"{len(listed)} in the list 'images', {len(places)} parts {{'type': 'image'}} or {_MARK} that "
            "take from it"
        )
        raise Rejected("unequal pictures and placeholders", cause)
    for k, part in enumerate(places):
        if part.value not in (None, k):
            cause = f"{part.where}: 'index' is {str(part.value)[:200]}, it is picture {k} of the chat"
            raise Rejected("index out of range", cause)
    following, shown = iter(listed), []
    for at, message in enumerate(said):
        # Nothing says which picture an answer is about: it may be any that was shown before.
        needs = [k for k in shown if k < at - 1] if message.role == "assistant" else ()
        laid = [_laid(part, following, draft) for part in message.parts]
        with _at(message.where):
            draft.turn(message.role, *laid, loss=message.loss, depends_on=needs)
        if any(isinstance(part, Image) for part in laid):
            shown.append(at)


def _message(message: Any, where: str, settings: Settings) -> _Message:
    with _at(where):
        name = want(message, "role", str)
        if name in _TOOLS or any(message.get(call) for call in _CALLS):
            raise _tools(settings, f"role {name!r}" if name in _TOOLS else "an assistant that calls a tool")
        if name not in _ROLES:
            raise Rejected("unknown role", f"role {name[:200]!r}; known: {', '.join(_ROLES)}")
        drawn = [] if message.get("images") is None else want(message, "images", list)
        if drawn and name != "assistant":
            raise Rejected("unknown part", f"'images' of a message by {name!r}; they go into its 'content'")
        silent = drawn and message.get("content") is None
        content = [] if silent else want(message, "content", (str, list))
        weight = message.get("weight")
        if weight is not None and (weight not in (0, 1) or name != "assistant"):
            cause = f"'weight' must be 0 or 1, of an assistant's message, got {str(weight)[:200]!r}"
            raise Rejected("unknown weight", cause)
    parts = _parts(content, f"{where}.content", settings) + _parts(drawn, f"{where}.images", settings)
    return _Message(where, _ROLES[name], parts, False if weight == 0 else None)


def _parts(content: str | list, where: str, settings: Settings) -> list[_Part]:
    if isinstance(content, str):
        return [_Part(where, "text", content)]
    parts = []
    for k, part in enumerate(content):
        with _at(f"{where}[{k}]"):
            parts.append(_Part(f"{where}[{k}]", *_read(part, settings)))
    return parts


def _marked(parts: list[_Part]) -> list[_Part]:
    """With the marks in texts as places of pictures; line breaks beside them are left off."""
    found = []
    for part in parts:
        if part.kind != "text" or _MARK not in part.value:
            found.append(part)
            continue
        for k, words in enumerate(part.value.split(_MARK)):
            found += [_Part(part.where, "next")] if k else []
            found += [_Part(part.where, "text", words.strip("\n"))] if words.strip() else []
    return found


def _read(part: Any, settings: Settings) -> tuple[str, Any]:
    """(kind, value) of a part."""
    kind = want(part, "type", str)
    if kind in _TOOLS:
        raise _tools(settings, f"a part of type {kind!r}")
    if kind == "text":
        return "text", want(part, "text", str)
    if kind == "image_url":
        named = want(part, "image_url", (str, dict))
        return "picture", named if isinstance(named, str) else want(named, "url", str)
    if kind != "image":
        raise Rejected("unknown part", f"type {kind[:200]!r}; known: text, image_url, image")
    forms = [form for form in _FORMS if part.get(form) is not None]
    if not forms:
        if unknown := [name for name in part if name not in ("type", "index") and part[name] is not None]:
            raise Rejected("unknown part", f"a picture by {unknown[0][:200]!r}; known: {', '.join(_FORMS)}")
        return "next", part.get("index")
    if len(forms) > 1:
        raise Rejected("unknown part", f"a picture given twice, by {' and '.join(map(repr, forms))}")
    if forms != ["source"]:
        return "picture", want(part, forms[0], str)
    source = want(part, "source", dict)
    match want(source, "type", str):
        case "base64":
            # Of which type it claims to be is no matter: its bytes say.
            return "picture", f"data:;base64,{want(source, 'data', str)}"
        case "url":
            return "picture", want(source, "url", str)
        case other:
            raise Rejected("unknown part", f"a source of type {other[:200]!r}; known: base64, url")


def _tools(settings: Settings, what: str) -> Exception:
    if settings.tools == "leave_out":
        return LeftOut("chats with tools")
    return Rejected("use of tools", f"{what}; the setting tools=leave_out leaves such chats out")


def _laid(part: _Part, following: Iterator[Any], draft: Draft) -> str | Image:
    if part.kind == "text":
        return part.value
    with _at(part.where):
        return draft.image(next(following) if part.kind == "next" else part.value)


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Says in a cause where it was."""
    try:
        yield
    except Rejected as error:
        raise Rejected(error.reason, f"{where}: {error}") from None
