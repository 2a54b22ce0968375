"""Captions against references by the COCO caption evaluator: CIDEr-D, BLEU-1 to 4, ROUGE-L, METEOR, SPICE.

The formulas are the classes of the package pycocoevalcap (extra [eval]), each called alone: the evaluator's
own entry runs all of them and needs Java for three parts. Here Java is needed for METEOR and SPICE alone;
the words come from ``measures.ptb``, with Java or without.

Captions and references are {id: text} and {id: texts}; figures are on the evaluator's scale, CIDEr from 0 to
10 and the others from 0 to 1.
"""

import contextlib
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from umm_jax.data.entries import extra
from umm_jax.evaluate.measures import ptb

# SPICE fetches these at its first use; we fetch nothing.
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class Unavailable(Exception):
    """A figure cannot be had on this machine; the message says why."""


@dataclass(frozen=True)
class Words:
    """Captions in words.

    Attributes:
        captions, references: {id: [text]}, words with one space between them, as the evaluator's classes
            take them; the same ids in the same order.
        by: names what found the words, "ptb-java" or "ptb-python"; figures of two are not quite comparable.
    """

    captions: Mapping[str, list[str]]
    references: Mapping[str, list[str]]
    by: str

    def of(self, ids: Sequence[str]) -> "Words":
        """Those of some ids alone."""
        return Words({i: self.captions[i] for i in ids}, {i: self.references[i] for i in ids}, self.by)


def in_words(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenizer: Literal["auto", "java", "python"] = "auto",
) -> Words:
    """Captions and references in words, without punctuation.

    Args:
        captions: one for each id. references: one or more for each of the same ids.
        tokenizer: "java" is the evaluator's own, "python" ours, "auto" the first where there is a Java.

    Raises:
        ConfigError: the package is missing. DataError: Java is, or it failed.
        ValueError: ids differ, or one has no reference.
    """
    if captions.keys() != references.keys() or not all(references.values()):
        raise ValueError("every caption needs references, and references a caption")
    java = tokenizer == "java" or (tokenizer == "auto" and ptb.has_java())
    texts = [text for id in captions for text in (captions[id], *references[id])]
    words = iter(ptb.java_words(texts) if java else map(ptb.python_words, texts))
    found: dict[str, list[str]] = {
        id: [" ".join(next(words)) for _ in range(1 + len(references[id]))] for id in captions
    }
    by = "ptb-java" if java else "ptb-python"
    return Words({id: f[:1] for id, f in found.items()}, {id: f[1:] for id, f in found.items()}, by)


def cider(words: Words) -> dict[str, float]:
    """{id: CIDEr-D}, 0..10; their mean is that of the corpus.

    A word counts the more the fewer pictures have it in their references, so each value depends on all the
    pictures that are scored: of some of them alone, all values are others.

    Raises:
        Unavailable: of one picture, or none: what all pictures have counts nothing, so all would be 0.
    """
    if len(words.captions) < 2:
        raise Unavailable("CIDEr weighs words by how many pictures have them, and needs more than one")
    if not any(text for texts in words.references.values() for text in texts):
        return dict.fromkeys(words.captions, 0.0)
    scorer = _part("cider.cider").Cider()
    _, each = scorer.compute_score(words.references, words.captions)
    return dict(zip(words.captions, map(float, each)))


def bleu(words: Words) -> tuple[float, float, float, float]:
    """BLEU-1 to 4 of the corpus, 0..1, by the reference nearest in length; no mean of pictures."""
    found, _ = _part("bleu.bleu").Bleu(4).compute_score(words.references, words.captions, verbose=0)
    return tuple(float(value) for value in found)


def rouge_l(words: Words) -> dict[str, float]:
    """{id: ROUGE-L}, 0..1: F with beta 1.2 of the best precision and the best recall over references."""
    _, each = _part("rouge.rouge").Rouge().compute_score(words.references, words.captions)
    return dict(zip(words.captions, map(float, each)))


def meteor(words: Words) -> float:
    """METEOR 1.5 of the corpus, 0..1; no mean of pictures.

    Raises:
        Unavailable: without Java, or where it failed.
    """
    _need_java("METEOR")
    scorer = _part("meteor.meteor").Meteor()
    try:
        value, _ = scorer.compute_score(words.references, words.captions)
    except (OSError, ValueError) as error:  # the pipe broke, or what came through it is no number
        # It keeps its lock when it fails, and waits for it, and for its pipe, when it is taken down.
        if scorer.lock.locked():
            scorer.lock.release()
        with contextlib.suppress(OSError):
            scorer.meteor_p.stdin.close()
        raise Unavailable(f"METEOR's Java failed: {error}") from None
    return float(value)


def spice(words: Words) -> dict[str, float]:
    """{id: SPICE}, 0..1.

    Raises:
        Unavailable: without Java or the parser's models, which are never fetched here; or where Java failed,
            as it does in recent releases.
    """
    _need_java("SPICE")
    part = _part("spice.spice")
    folder = Path(part.__file__).parent / "lib"
    if missing := [name for name in _SPICE_MODELS if not (folder / name).exists()]:
        raise Unavailable(
            f"SPICE needs {' and '.join(missing)} of Stanford CoreNLP 3.6.0 in {folder}; put them there"
        )
    try:
        _, each = part.Spice().compute_score(words.references, words.captions)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise Unavailable(f"SPICE's Java failed: {error}") from None
    # It answers in the order of sorted ids.
    found = {id: float(one["All"]["f"]) for id, one in zip(sorted(words.captions), each)}
    if unread := sum(value != value for value in found.values()):
        raise Unavailable(f"SPICE gave no number for {unread} of {len(found)} captions")
    return {id: found[id] for id in words.captions}


def _part(name: str) -> Any:
    return extra(f"pycocoevalcap.{name}", "captions", "pycocoevalcap", "eval")


def _need_java(what: str) -> None:
    if not ptb.has_java():
        raise Unavailable(f"{what} needs Java, which is not installed")
