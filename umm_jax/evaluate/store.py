"""The folder of one model on one benchmark: what was asked, what came back, what it is worth.

    DIR/plan.json                   what is asked of whom, see ``benchmark.plan``
        requests.jsonl              {"id", "request"} of every doc, in order
        responses-00000-of-00002.jsonl   one line a doc, of the docs this process asks; appended and synced
        media/<sha256>.png          pictures of responses
        scores.jsonl, score.json    from ``benchmark.score``

Responses are only ever appended. A doc is asked again when its request is another than the one that was
answered: another model, checkpoint, prompt, picture, seed or way of replying.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from umm_jax.data.files import storage_errors, sync, write_atomic
from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate import responses as replies
from umm_jax.evaluate.contract import Response
from umm_jax.evaluate.responses import MEDIA

PLAN, REQUESTS, SCORES, SCORE = "plan.json", "requests.jsonl", "scores.jsonl", "score.json"


class Folder:
    """Reads and writes one such folder. Every method that writes raises StorageError."""

    def __init__(self, path: str | Path):
        if "://" in str(path):
            raise ConfigError(
                f"{path}: replies are appended to a folder; mount the bucket (gcsfuse) and give its path"
            )
        self.path = Path(path)

    # --- what is asked ----------------------------------------------------------------------------

    def write_plan(self, plan: Mapping[str, Any], requests: Sequence[tuple[str, str]]) -> None:
        """`requests` are (doc's id, hash of its request). Figures of other requests are removed."""
        with storage_errors(self.path):
            (self.path / MEDIA).mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"id": id, "request": request}) + "\n" for id, request in requests)
        path = self.path / REQUESTS
        if not path.exists() or path.read_text() != lines:
            for name in (SCORE, SCORES):
                (self.path / name).unlink(missing_ok=True)
            write_atomic(path, lines)
        # Last, and with the requests' hash: what a kill in between leaves is known to be of two plans.
        plan = {**plan, "requests_hash": hashlib.sha256(lines.encode()).hexdigest()}
        write_atomic(self.path / PLAN, json.dumps(plan, indent=1) + "\n")

    def plan(self) -> dict[str, Any]:
        """Raises DataError where nothing was planned, or the files are damaged or of two plans."""
        try:
            plan = json.loads((self.path / PLAN).read_text())
            lines = (self.path / REQUESTS).read_bytes()
            if plan["requests_hash"] != hashlib.sha256(lines).hexdigest():
                raise DataError(f"{self.path}: planning was cut short; plan again")
            return plan
        except FileNotFoundError:
            raise DataError(
                f"{self.path}: nothing is planned here; umm eval plan --out={self.path}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path / PLAN}: cannot be read ({error!r}); plan again") from None

    def requests(self) -> dict[str, str]:
        """{doc's id: hash of its request}, in order. Raises DataError."""
        return {line["id"]: line["request"] for line in replies.read_lines(self.path / REQUESTS)}

    # --- what came back ---------------------------------------------------------------------------

    def shards(self) -> list[Path]:
        return sorted(self.path.glob("responses-*.jsonl"))

    def lines(self) -> dict[str, dict[str, Any]]:
        """{doc's id: its line} of the responses to the requests that are planned; of two, the last.

        Raises:
            DataError: a file is damaged elsewhere than in its last line.
        """
        wanted, found = self.requests(), {}
        for shard in self.shards():
            for line in replies.read_lines(shard, torn=True):
                if wanted.get(line.get("id")) == line.get("request"):
                    found[line["id"]] = line
        return found

    def responses(self, lines: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Response]:
        """{doc's id: response} of :meth:`lines`, which are read unless given."""
        found = self.lines() if lines is None else lines
        return {id: replies.parse(line, self.path, f"{self.path}: {id}") for id, line in found.items()}

    # --- what it is worth -------------------------------------------------------------------------

    def write_score(self, figures: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
        write_atomic(self.path / SCORES, "".join(json.dumps(row) + "\n" for row in rows))
        write_atomic(self.path / SCORE, json.dumps(figures, indent=1, allow_nan=False) + "\n")

    def score(self) -> dict[str, Any] | None:
        """None where it was not scored yet. Raises DataError."""
        path = self.path / SCORE
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); score again") from None


def hash_of(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Of all responses that count, in whatever order and files they are."""
    return hashlib.sha256(json.dumps(sorted(lines.items()), sort_keys=True).encode()).hexdigest()


class Appending:
    """A shard of responses that is being written; a torn last line of an earlier run is cut off first."""

    def __init__(self, folder: Folder, index: int, count: int):
        self.folder = folder
        self.path = folder.path / f"responses-{index:05d}-of-{count:05d}.jsonl"
        with storage_errors(self.path):
            self._file = open(self.path, "ab+")
            _cut_torn(self._file)

    def add(self, found: Iterable[tuple[Response, str]]) -> None:
        """Writes responses with the hashes of their requests: pictures first, then all lines, on the disk.

        Raises:
            StorageError: what was finished before stays.
        """
        lines = []
        for response, request in found:
            for image in response.images.values():
                path = self.folder.path / MEDIA / f"{image.sha256}.png"
                if not path.exists():
                    write_atomic(path, image.data)
            lines.append(json.dumps(replies.line_of(response, request=request), allow_nan=False) + "\n")
        with storage_errors(self.path):
            self._file.write("".join(lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with storage_errors(self.path):
            self._file.close()
            sync(self.path.parent)

    def __enter__(self) -> "Appending":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _cut_torn(file) -> None:
    """Ends an append-only file after its last line break."""
    end = file.seek(0, os.SEEK_END)
    at = end
    while at > 0:
        start = max(0, at - (1 << 16))
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            at = start + found + 1
            break
        at = start
    if at < end:
        file.truncate(at)
        file.flush()
    file.seek(0, os.SEEK_END)
