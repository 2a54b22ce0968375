"""What a folder of dialogues holds, for those who will train on it: report.json, and a page with pictures.

Everything is counted from the records, the manifest and the quarantine. Checks of synthesised dialogues are
run again here, so the rate of necessity is measured on what was written and not believed of who wrote it.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umm_jax.conversation import Conversation, Image, Text
from umm_jax.data.files import storage_errors, write_atomic
from umm_jax.data.likeness import overlap
from umm_jax.data.quarantine import FILE
from umm_jax.data.records import RecordSource, open_source
from umm_jax.data.report_page import page
from umm_jax.data.synthesis import checks
from umm_jax.errors import DataError

REJECTS, SAMPLES = 20, 12


def write(
    folder: str | Path,
    out: str | Path,
    against: Sequence[str | Path] = (),
    limit: int = 20_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes report.json and report.html to `out` and gives the report.

    Args:
        against: folders, such as evaluation sets, to look for the same pictures and words in.
        limit: records that are read, spread over all of them. seed: of the samples shown.

    Raises:
        DataError: no finished folder. StorageError: disk full.
    """
    source = open_source(folder)
    chosen = range(0, len(source), max(1, -(-len(source) // limit)))
    records = [source.conversation(index) for index in chosen]
    report = collect(records, source)
    report["overlap"] = {}
    for other in against:
        if Path(other).resolve() == Path(folder).resolve():
            raise DataError(f"{other}: is the folder itself")
        found = overlap(records, open_source(other))
        report["overlap"][str(other)] = {
            kind: {"records": len(pairs), "examples": pairs[:5]} for kind, pairs in found.items()
        }
    report["rejects"] = _rejects(Path(folder) / FILE, seed)
    out = Path(out)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    samples = random.Random(seed).sample(records, min(SAMPLES, len(records)))
    write_atomic(out / "report.html", page(report, samples, str(folder)))
    return report


# --- counting -----------------------------------------------------------------------------------------------


def collect(records: Sequence[Conversation], source: RecordSource) -> dict[str, Any]:
    """All figures, as plain values."""
    user = [t for r in records for t in r.turns if t.role == "user"]
    texts = [t.text for t in user]
    return {
        "records": len(source),
        "read": len(records),
        "turns": _spread(len(r.turns) for r in records),
        "images": _spread(len(r.images) for r in records),
        "words": _spread(sum(len(t.text.split()) for t in r.turns) for r in records),
        "dependency distance": _spread(_distances(records)),
        "antecedents": _spread(len(t.depends_on) for t in user),
        "operations": _shares(t.op or "(none)" for t in user),
        "operations in a row": _shares(
            f"{a.op or '(none)'} > {b.op or '(none)'}"
            for r in records
            for a, b in _pairs([t for t in r.turns if t.role == "user"])
        ),
        "roles": _shares(t.meta["role"] for t in user if t.meta.get("role")),
        "distractors": _shares(t.op or "chat" for t in user if t.meta.get("role") == "distractor"),
        "references": _shares(t.meta["reference"][0] for t in user if "reference" in t.meta),
        "words by": _shares(t.meta["by"] for t in user if "by" in t.meta),
        "distinct": {f"{n}-grams": _distinct(texts, n) for n in (1, 2, 3)},
        "skeletons": _skeletons(texts),
        "answers": _answers(records),
        "context": _context(records),
        "sources": _shares(r.source or "(not said)" for r in records),
        "licenses": _shares(r.license or "(not said)" for r in records),
        "splits": _shares(r.split for r in records),
        "duplicates": _duplicates(records),
        "made": source.manifest.get("counts", {}),
        "how": source.manifest.get("how", {}),
    }


def _spread(values) -> dict[str, Any]:
    counts = Counter(values)
    total = counts.total()
    if not total:
        return {"mean": 0.0, "max": 0, "counts": {}}
    mean = sum(value * count for value, count in counts.items()) / total
    return {"mean": round(mean, 3), "max": max(counts), "counts": {str(k): counts[k] for k in sorted(counts)}}


def _shares(names) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _pairs(values: list) -> zip:
    return zip(values, values[1:])


def _distances(records: Sequence[Conversation]) -> list[int]:
    """Exchanges from the oldest turn that a question depends on to the question; 0 where on none."""
    return [
        (t - min(turn.depends_on)) // 2 + (t - min(turn.depends_on)) % 2 if turn.depends_on else 0
        for r in records
        for t, turn in enumerate(r.turns)
        if turn.role == "user"
    ]


def _distinct(texts: Sequence[str], n: int) -> float:
    """Different runs of n words over all of them."""
    found: Counter[tuple] = Counter()
    for text in texts:
        words = text.lower().split()
        found.update(tuple(words[k : k + n]) for k in range(len(words) - n + 1))
    return round(len(found) / max(1, found.total()), 4)


def _skeletons(texts: Sequence[str]) -> dict[str, Any]:
    """Texts with their rarer words left blank: how many forms there are, and how evenly they are used."""
    words = Counter(word for text in texts for word in text.lower().split())
    common = {word for word, _ in words.most_common(60)}
    forms = Counter(" ".join(w if w in common else "_" for w in text.lower().split()) for text in texts)
    total = max(1, forms.total())
    entropy = -sum(count / total * math.log2(count / total) for count in forms.values())
    top = sum(count for _, count in forms.most_common(20)) / total
    return {"forms": len(forms), "entropy bits": round(entropy, 2), "share of the top 20": round(top, 4)}


def _answers(records: Sequence[Conversation]) -> dict[str, Any]:
    """Of every operation answered in words: the share of the most frequent answer, and bits of entropy."""
    by_op: dict[str, Counter] = {}
    for r in records:
        for asked, answered in _pairs(list(r.turns)):
            parts = answered.parts
            if answered.role == "assistant" and all(isinstance(p, Text) for p in parts) and asked.op:
                by_op.setdefault(asked.op, Counter())[answered.text] += 1
    found = {}
    for op, answers in sorted(by_op.items()):
        total = answers.total()
        entropy = -sum(count / total * math.log2(count / total) for count in answers.values())
        (answer, count), *_ = answers.most_common(1)
        found[op] = {
            "answers": total,
            "different": len(answers),
            "majority": round(count / total, 4),
            "majority answer": answer[:80],
            "entropy bits": round(entropy, 2),
        }
    return found


def _context(records: Sequence[Conversation]) -> dict[str, Any]:
    """Of the turns that are marked as depending on the history: what the checks say of them now."""
    synthesised = [r for r in records if "pictures" in r.meta and any("role" in t.meta for t in r.turns)]
    failed: Counter[str] = Counter()
    dependent = necessary = 0
    recent: list[tuple[bool, float]] = []
    for r in synthesised:
        said = checks.failures(r)
        failed.update(said)
        flagged = sum(t.meta.get("role") == "dependent" for t in r.turns)
        dependent += flagged
        necessary += flagged - sum(check in checks.NECESSITY for check in said)
        recent += checks.recency(r)
    if not dependent:
        return {"dependent turns": 0}
    return {
        "dependent turns": dependent,
        "necessity": round(necessary / dependent, 5),
        "recency baseline": round(sum(right for right, _ in recent) / len(recent), 4),
        "chance": round(sum(chance for _, chance in recent) / len(recent), 4),
        "checks failed": dict(failed),
        "distance": _spread(d for r in synthesised for d in checks.distance(r)),
    }


def _duplicates(records: Sequence[Conversation]) -> dict[str, int]:
    """Records whose words and pictures are those of an earlier one; pictures that several records show."""
    told: Counter[tuple] = Counter()
    shown: Counter[str] = Counter()
    for r in records:
        images = {ref: image.sha256 for ref, image in r.images.items()}
        shown.update(set(images.values()))
        told[tuple(images[p.ref] if isinstance(p, Image) else repr(p) for t in r.turns for p in t.parts)] += 1
    return {
        "records": sum(count - 1 for count in told.values()),
        "pictures": len(shown),
        "pictures in several records": sum(count > 1 for count in shown.values()),
    }


def _rejects(path: Path, seed: int) -> list[dict[str, Any]]:
    """Some of the quarantine, drawn at random."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    chosen = random.Random(seed).sample(lines, min(REJECTS, len(lines)))
    return [json.loads(line) for line in chosen]
