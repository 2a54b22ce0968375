"""An answer and its plan as plain JSON, for programs that run the calls themselves."""

from collections.abc import Sequence
from typing import Any

from umm_jax.markup.grammar import Answer, Boxes, Call, Ref, Text, Times
from umm_jax.markup.plan import Step


def manifest(answer: Answer, steps: Sequence[Step]) -> dict[str, Any]:
    """{"text", "segments", "calls", "diagnostics"}; a segment that is a call names it by number."""
    segments, calls = [], 0
    for segment in answer.segments:
        if isinstance(segment, Call):
            segments.append({"kind": "call", "call": calls})
            calls += 1
        else:
            segments.append(_plain(segment))
    return {
        "text": answer.text,
        "segments": segments,
        "calls": [_call(step) for step in steps],
        "diagnostics": [diagnostic._asdict() for diagnostic in answer.diagnostics],
    }


def _plain(segment: Text | Ref | Boxes | Times) -> dict[str, Any]:
    match segment:
        case Text(text):
            return {"kind": "text", "text": text}
        case Ref(text):
            return {"kind": "ref", "text": text}
        case Boxes(boxes):
            return {"kind": "boxes", "boxes": [list(box) for box in boxes]}
    return {"kind": "times", "spans": [list(span) for span in segment.spans]}


def _call(step: Step) -> dict[str, Any]:
    call = step.call
    return {
        "task": call.task,
        "prompt": step.prompt,
        "boxes": [list(box) for box in call.boxes],
        "times": [list(span) for span in call.times],
        "masks": len(call.masks),
        "objects": [
            {"phrase": phrase, "boxes": [list(box) for box in boxes]} for phrase, boxes in call.objects
        ],
        "takes": None if step.takes is None else str(step.takes),
        "missing": step.missing,
        "implicit": call.implicit,
        "flawed": call.flawed,
    }
