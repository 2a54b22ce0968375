"""Yes and no: how the evaluators of POPE and MME read a reply, a strict reading, and figures of many.

POPE's takes for yes all that does not say no, so one that never answers gets half of it right, with a yes
ratio of 1. MME's looks for "yes", then for "no", within the first four letters: "know" is a no to it.

Sources: the evaluators that POPE and MME publish with their data.
"""

import re
from collections.abc import Iterable

_FIRST_WORD = re.compile(r"[^\W_]+")


def pope(reply: str) -> bool:
    """Whether POPE's evaluator reads a yes: no word "No", "no" or "not" before the first full stop.

    Words are what blanks part, commas taken out: "no!" and "NO" are none of these, and so a yes.
    """
    words = reply.split(".", 1)[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def mme(reply: str) -> bool | None:
    """What MME's evaluator reads in the first four letters; None for what it calls "other"."""
    start = reply.lower()[:4]
    return True if "yes" in start else False if "no" in start else None


def strict(reply: str) -> bool | None:
    """Whether the first word is "yes" or "no", in whatever letters; None where it is neither."""
    word = _FIRST_WORD.search(reply)
    return {"yes": True, "no": False}.get(word.group().lower()) if word else None


def figures(told: Iterable[tuple[bool, bool | None]]) -> dict[str, float | None]:
    """accuracy, precision, recall, f1 and yes_ratio, each 0..1, with yes as what is looked for.

    Args:
        told: (what is right, what was said) of each question; None, neither, is wrong and no yes.

    Returns:
        None for what has no value: the precision of one that never says yes, the recall where yes is never
        right, and the F1 of both. F1 is 0 where both are 0, where POPE's evaluator divides by it.
    """
    told = list(told)
    hits = sum(right and said is True for right, said in told)
    yes, wanted = sum(said is True for _, said in told), sum(right for right, _ in told)
    precision = hits / yes if yes else None
    recall = hits / wanted if wanted else None
    f1 = 2 * hits / (yes + wanted) if yes and wanted else None
    n = len(told)
    return {
        "accuracy": sum(right is said for right, said in told) / n if n else None,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": yes / n if n else None,
    }
