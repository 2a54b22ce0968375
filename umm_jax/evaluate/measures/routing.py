"""Whether an answer asks for the right tasks: measures that need no expert."""

from collections import Counter
from collections.abc import Mapping, Sequence

from umm_jax.evaluate.measures.edits import edit_distance
from umm_jax.evaluate.measures.regions import box_iou
from umm_jax.markup.grammar import Answer, Call

# What makes a part of an answer unreadable, rather than oddly spelt.
_UNREADABLE = {
    "UNKNOWN_TAG",
    "UNCLOSED_CALL",
    "UNCLOSED_BOX",
    "MISMATCHED_CLOSE",
    "NESTED_CALL",
    "STRAY_CLOSE",
}
_UNREADABLE |= {"BOX_ARITY", "TIME_ARITY", "EMPTY_CALL", "TOO_MANY_CALLS"}


def route_scores(found: Answer, right: Sequence[Call]) -> Mapping[str, float]:
    """Figures of one answer; those of arguments only where a right call is there to have them.

    | figure | |
    |---|---|
    | exact | the same tasks in the same order |
    | precision, recall, f1 | of the tasks as a multiset; 1 where neither has any |
    | distance | insertions, deletions and exchanges of tasks |
    | prompt | share of the right calls, in order, with the same words |
    | box | share of the right calls with boxes whose boxes, in order, all have IoU above a half |
    | unreadable | whether something of it could not be read |
    """
    got, wanted = [c.task for c in found.calls], [c.task for c in right]
    common = (Counter(got) & Counter(wanted)).total()
    precision = common / len(got) if got else float(not wanted)
    recall = common / len(wanted) if wanted else float(not got)
    total = precision + recall
    scores = {
        "exact": float(got == wanted),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
        "distance": float(edit_distance(got, wanted)),
        "unreadable": float(any(d.code in _UNREADABLE for d in found.diagnostics)),
    }
    pairs = list(zip(found.calls, right)) if got == wanted else []
    if right:
        scores["prompt"] = sum(_words(a) == _words(b) for a, b in pairs) / len(right)
    if boxed := [call for call in right if call.boxes]:
        hits = sum(_same_boxes(a, b) for a, b in pairs if b.boxes)
        scores["box"] = hits / len(boxed)
    return scores


def _words(call: Call) -> list[str]:
    return call.prompt.lower().split()


def _same_boxes(a: Call, b: Call) -> bool:
    return len(a.boxes) == len(b.boxes) and all(box_iou(x, y) > 0.5 for x, y in zip(a.boxes, b.boxes))
