"""Judges: who says what a drawn picture is worth where no formula can.

    none      nobody: figures are null with a reason
    recorded  a file of verdicts, see ``evaluate/verdicts.py``
    openai    any endpoint of the form /v1/chat/completions, at temperature 0

What an endpoint said is kept in a file, by the hash of model, template, words and pictures: asking again asks
nothing twice. What went wrong there (a time-out, an answer of another form) is a failure with a reason, which
is not kept, so that it is asked again; it is never a verdict. Judges of different identity are different
measures.
"""

import base64
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from umm_jax.conversation import ImageData
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.data.synthesis.rewriters import Endpoint
from umm_jax.errors import ConfigError
from umm_jax.evaluate import verdicts
from umm_jax.evaluate.verdicts import Verdict, Verdicts

VERSION = 1  # of how words and pictures are put to an endpoint
_LONGEST = 1 << 20  # bytes of an answer
_AGAIN = (408, 409, 425, 429)  # and 500 and above: the same request may succeed later
_NEVER = (401, 403, 404)  # no request of ours will succeed


@dataclass(frozen=True)
class Asked:
    """What a judge is asked.

    Attributes:
        id: of the doc. question: tells it from others about the same doc.
        prompt: all words. pictures: what it is to look at, in order.
    """

    id: str
    question: str
    prompt: str
    pictures: tuple[ImageData, ...] = ()


class Judge(Protocol):
    """Who is asked.

    Attributes:
        identity: "kind/model/hash of the templates"; it stands in results.
    """

    identity: str

    def ask(self, asked: Asked) -> Verdict:
        """What it says, or a failure with its reason. Raises ConfigError: it can never be asked."""


def template_hash(templates: Mapping[str, str]) -> str:
    """Of the words a judge is asked with, before prompts are put in."""
    return hashlib.sha256(json.dumps(dict(templates), sort_keys=True).encode()).hexdigest()[:16]


def read_templates(path: str | Path, known: Mapping[str, str]) -> dict[str, str]:
    """Templates from a JSON file, {question: words}; those it leaves out are ours.

    Raises:
        ConfigError: unreadable, or a question that is not `known`.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: templates cannot be read: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(words, str) for words in found.values()):
        raise ConfigError(f"{path}: must be a JSON object of words by question")
    if odd := sorted(set(found) - set(known)):
        names = ", ".join(map(repr, known))
        raise ConfigError(f"{path}: {odd[0]!r} is no question of this benchmark; its questions are {names}")
    return {**known, **found}


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template with values in the place of their names, in one go: a value may look like a name."""
    return re.sub("|".join(map(re.escape, values)), lambda found: values[found.group()], template)


class Nobody:
    """The judge who is not there."""

    identity = "none"

    def ask(self, asked: Asked) -> Verdict:
        return Verdict(failure=verdicts.NO_JUDGE)


class Recorded:
    """A judge who was asked before.

    Args:
        path: lines of the form of this package.

    Raises:
        DataError: damaged, or from two judges.
    """

    def __init__(self, path: str | Path):
        found: Verdicts = verdicts.recorded(verdicts.lines(Path(path)), path)
        self.identity, self._found = found.identity, found

    def ask(self, asked: Asked) -> Verdict:
        return self._found.of(asked.id, asked.question) or Verdict(failure=verdicts.NO_VERDICT)


class Cache:
    """Answers by the hash of what was asked: a file that is only ever appended to, one whole line at a time.

    A line that was torn by a kill, wherever it stands, is no answer, and is asked again. Several threads and
    processes may append to the same file.
    """

    def __init__(self, path: str | Path):
        self.path, self._lock = Path(path), threading.Lock()
        self._found: dict[str, str] = {}
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            data = self.path.read_bytes() if self.path.exists() else b""
        for line in data.split(b"\n"):
            try:
                entry = json.loads(line)
                self._found[str(entry["key"])] = entry["text"] + ""
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, key: str) -> str | None:
        return self._found.get(key)

    def put(self, key: str, text: str, facts: Mapping[str, Any]) -> None:
        """Keeps an answer; it is on the disk afterwards. Raises StorageError."""
        # A line break before it, too: what a killed process left unfinished must not swallow this line.
        line = "\n" + json.dumps({"key": key, "text": text, **facts}) + "\n"
        with self._lock, storage_errors(self.path):
            with open(self.path, "ab", buffering=0) as file:
                file.write(line.encode())
                os.fsync(file.fileno())
            self._found[key] = text


class _Failed(Exception):
    """An answer that did not come. The message is the reason, in few words."""


class OpenAI:
    """An endpoint of the form /v1/chat/completions.

    Args:
        endpoint: where, which model, how long and how often; its temperature is not used: it is 0.
        cache: answers that were given before.
        templates: the hash of what it is asked with, see :func:`template_hash`.
        max_tokens: of an answer.
    """

    def __init__(self, endpoint: Endpoint, cache: Cache, templates: str, max_tokens: int = 1024):
        self.endpoint = replace(endpoint, temperature=0.0)
        self.cache, self.templates, self.max_tokens = cache, templates, max_tokens
        self.identity = verdicts.identity("openai", endpoint.model, templates)
        self._calls, self._lock = 0, threading.Lock()

    def key(self, asked: Asked) -> str:
        """Hash of all that an answer depends on."""
        facts = {
            "version": VERSION,
            "model": self.endpoint.model,
            "template_hash": self.templates,
            "max_tokens": self.max_tokens,
            "prompt": asked.prompt,
            "pictures": [picture.sha256 for picture in asked.pictures],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def ask(self, asked: Asked) -> Verdict:
        """Raises ConfigError: no key in the environment, or the endpoint refuses us."""
        key = self.key(asked)
        text = self.cache.get(key)
        if text is None:
            with self._lock:
                if self.endpoint.budget and self._calls >= self.endpoint.budget:
                    return Verdict(failure="over budget")
                self._calls += 1
            try:
                text = self._answer(self._request(asked))
            except _Failed as error:
                return Verdict(failure=str(error))
            facts = {"model": self.endpoint.model, "template_hash": self.templates, "id": asked.id}
            self.cache.put(key, text, facts | {"question": asked.question})
        return Verdict(text)

    def _request(self, asked: Asked) -> urllib.request.Request:
        parts: list[dict[str, Any]] = [{"type": "text", "text": asked.prompt}]
        for picture in asked.pictures:
            data = base64.b64encode(picture.data).decode()
            parts.append({"type": "image_url", "image_url": {"url": f"data:{picture.mime};base64,{data}"}})
        body = {
            "model": self.endpoint.model,
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": parts}],
        }
        headers = {"Content-Type": "application/json"}
        if name := self.endpoint.key:
            if name not in os.environ:
                raise ConfigError(f"the environment has no {name}, which is to hold the judge's key")
            headers["Authorization"] = f"Bearer {os.environ[name]}"
        url = self.endpoint.url.rstrip("/") + "/chat/completions"
        return urllib.request.Request(url, json.dumps(body).encode(), headers)

    def _answer(self, request: urllib.request.Request) -> str:
        """The text of an answer, after as many tries as are allowed. Raises _Failed."""
        problem = ""
        for attempt in range(self.endpoint.tries):
            if attempt:
                # A little apart from others that failed at the same moment.
                time.sleep(min(0.5 * 2**attempt, 30.0) * (0.5 + random.random()))
            try:
                return _text_of(self._sent(request))
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code in _NEVER:
                    raise ConfigError(f"{request.full_url}: the judge refuses us: {problem}") from None
                if error.code < 500 and error.code not in _AGAIN:
                    break
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                problem = "timed out" if isinstance(reason, TimeoutError) else "no connection"
            except (ValueError, LookupError, TypeError):
                problem = "malformed answer"
        raise _Failed(problem)

    def _sent(self, request: urllib.request.Request) -> bytes:
        """Raises TimeoutError, too, where an answer comes in drops for longer than is allowed."""
        until = time.monotonic() + self.endpoint.seconds
        received = b""
        with urllib.request.urlopen(request, timeout=self.endpoint.seconds) as response:
            while len(received) < _LONGEST and (more := response.read1(1 << 16)):
                received += more
                if time.monotonic() > until:
                    raise TimeoutError
        return received


def _text_of(answer: bytes) -> str:
    """Raises ValueError, LookupError or TypeError: not of the form, or without a word."""
    text = json.loads(answer)["choices"][0]["message"]["content"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no text")
    return text


# --- asking about a whole benchmark -------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeSettings:
    """Which judge.

    Attributes:
        kind: see above. recorded: file of verdicts.
        url, model, key, seconds, tries, budget: of an endpoint, see ``rewriters.Endpoint``.
        cache: file of its answers.
    """

    kind: Literal["none", "recorded", "openai"] = "none"
    recorded: str = ""
    url: str = ""
    model: str = ""
    key: str = ""
    seconds: float = 120.0
    tries: int = 3
    budget: int = 0
    max_tokens: int = 1024
    cache: str = ""

    def __post_init__(self):
        if self.kind == "recorded" and not self.recorded:
            raise ConfigError("a recorded judge needs `recorded`, a file of verdicts")
        if self.kind == "openai" and not (self.url and self.model and self.cache):
            raise ConfigError("a judge behind an endpoint needs `url`, `model` and `cache`")


def make(settings: JudgeSettings, templates: Mapping[str, str]) -> Judge:
    """The judge of these settings. Raises ConfigError, DataError."""
    if settings.kind == "none":
        return Nobody()
    if settings.kind == "recorded":
        return Recorded(settings.recorded)
    names = ("url", "model", "key", "seconds", "tries", "budget")
    endpoint = Endpoint(**{name: getattr(settings, name) for name in names})
    return OpenAI(endpoint, Cache(settings.cache), template_hash(templates), settings.max_tokens)


def collect(judge: Judge, asked: Iterable[Asked], path: str | Path, *, workers: int = 4) -> dict[str, int]:
    """Asks a judge and writes a file of verdicts; {"asked", "failed"}.

    The file is written when all is asked. A run that was killed before has its answers in the judge's cache.

    Args:
        asked: read a few at a time, so that not all pictures are in memory.
        workers: requests under way at once.

    Raises:
        ConfigError: the judge can never be asked. StorageError.
    """
    about = _parts_of(judge.identity)
    rows, failed = [], 0
    with ThreadPoolExecutor(workers) as pool:
        for part in _parts(asked, 4 * workers):
            for one, verdict in zip(part, pool.map(judge.ask, part)):
                failed += bool(verdict.failure)
                said = {"failure": verdict.failure} if verdict.failure else {"text": verdict.text}
                if verdict.score is not None:
                    said = {"score": verdict.score}
                rows.append({"id": one.id, "question": one.question, **about, **said})
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    return {"asked": len(rows), "failed": failed}


def _parts_of(identity: str) -> dict[str, str]:
    """What an identity is made of; names of models may have slashes in them."""
    kind, _, rest = identity.partition("/")
    model, _, template = rest.rpartition("/")
    return {"kind": kind, "model": model, "template_hash": template}


def _parts(found: Iterable[Asked], most: int) -> Iterator[list[Asked]]:
    found = iter(found)
    while part := list(itertools.islice(found, most)):
        yield part
