"""What of foreign data does not become a record: counted by reason, and kept with its cause.

Two kinds of reasons. :class:`Rejected` is broken or unsafe, a record or a picture of it; it is counted,
written to the quarantine with where it stands and why, and too many of them fail the run. :class:`LeftOut` is
sound and not wanted by the settings; it is only counted. Neither is ever replaced by another.

    FOLDER/quarantine.jsonl, a line each:
    {"record": 17, "what": "picture", "reason": "damaged picture", "where": "a.jsonl, line 3",
     "cause": "...", "entry": "the first 2000 letters of the annotation"}
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from umm_jax.errors import DataError

FILE = "quarantine.jsonl"
_LETTERS = 2000  # of an annotation


class Rejected(DataError):
    """Something of foreign data that is not let in.

    Attributes:
        reason: few words without particulars, for counting: "damaged picture".
    """

    def __init__(self, reason: str, cause: str):
        super().__init__(cause)
        self.reason = reason


class LeftOut(Exception):
    """A sound entry that the settings do not want; its text is the reason, for counting."""


@dataclass
class Tally:
    """Counts by kind and reason, and the lines of the quarantine.

    The kinds are "left out", "rejected records", "rejected pictures", "pictures" (all that were looked at),
    "changed pictures", "licenses".
    """

    counts: dict[str, Counter] = field(default_factory=dict)
    quarantine: list[dict[str, Any]] = field(default_factory=list)

    def count(self, kind: str, reason: str, number: int = 1) -> None:
        self.counts.setdefault(kind, Counter())[reason] += number

    def reject(self, what: str, error: Rejected, index: int, where: str, entry: Any) -> None:
        """`what` is "record" or "picture"."""
        self.count(f"rejected {what}s", error.reason)
        said = entry.decode("utf-8", "replace") if isinstance(entry, bytes) else repr(_readable(entry))
        facts = {"record": index, "what": what, "reason": error.reason, "where": where}
        self.quarantine.append({**facts, "cause": str(error), "entry": said[:_LETTERS]})

    def add(self, other: "Tally") -> None:
        """Adds the counts, not the quarantine: that goes to a file."""
        for kind, counts in other.counts.items():
            self.counts.setdefault(kind, Counter()).update(counts)

    def total(self, kind: str) -> int:
        return self.counts.get(kind, Counter()).total()

    def plain(self) -> dict[str, dict[str, int]]:
        """As JSON values, in an order that does not depend on who counted first."""
        return {kind: dict(sorted(counts.items())) for kind, counts in sorted(self.counts.items()) if counts}

    @classmethod
    def of(cls, plain: Mapping[str, Mapping[str, int]]) -> "Tally":
        return cls({kind: Counter(counts) for kind, counts in plain.items()})

    def lines(self) -> str:
        return "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in self.quarantine)

    def too_many(self, limit: float, records: int) -> str | None:
        """What to say where more than this share of records or pictures was rejected, else None."""
        for what, all_ in (("record", records), ("picture", self.total("pictures"))):
            rejected = self.counts.get(f"rejected {what}s", Counter())
            if rejected.total() > limit * all_:
                said = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common(3))
                return f"{rejected.total()} of {all_} {what}s were rejected, more than {limit:.1%} ({said})"
        return None


def _readable(value: Any) -> Any:
    """Columns of a table, pictures in them told by their size alone."""
    match value:
        case bytes():
            return f"({len(value)} bytes)"
        case Mapping():
            return {key: _readable(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_readable(inner) for inner in value]
    return _readable(value.raw) if hasattr(value, "raw") else value
