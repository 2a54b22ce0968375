"""Between the parts of a record and the segments of an answer.

| in a record | in an answer |
|---|---|
| ``Text`` | words |
| ``Box`` with a label | a phrase and a box; without one, a box |
| ``TaskCall(task, {"payload": ...})`` and the ``Mask`` parts after it | a call, with a mark for each mask |
| ``Mask`` alone | a call of image_seg in its label's words |
| ``Image`` after a call | nothing: it is what the call gave |

A payload is what stands inside a call, in the spelling of umm1 and without marks of masks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from umm_jax import conversation as C
from umm_jax.errors import DataError
from umm_jax.markup import dialects, grammar
from umm_jax.markup.grammar import Answer, Boxes, Call, Ref, Seg, Text, Times
from umm_jax.markup.tasks import TASKS

UMM1 = dialects.get("umm1")


class Said(NamedTuple):
    """A segment of an answer with the parts of the record it came from: masks, or a picture."""

    segment: Text | Ref | Boxes | Times | Call | None
    masks: tuple[C.Mask, ...] = ()
    image: C.Image | None = None


def payload(call: Call) -> str:
    """What a call says. Raises ValueError for words that look like a tag."""
    parts = tuple(part for part in call.parts if not isinstance(part, Seg))
    return grammar.render(Answer(parts), UMM1)


def task_call(call: Call) -> C.TaskCall:
    """Raises ValueError for words that look like a tag."""
    return C.TaskCall(call.task, {"payload": payload(call)})


def call_of(part: C.TaskCall) -> Call:
    """The call a part of a record stands for.

    Raises:
        DataError: no task of ours, or a payload that is not well formed.
    """
    said = part.args.get("payload")
    if part.name not in TASKS or not isinstance(said, str) or set(part.args) != {"payload"}:
        raise DataError(
            f"task call {part.name!r} with {', '.join(map(repr, part.args)) or 'nothing'}: a call has a "
            f"payload, its words, and a name of {', '.join(TASKS)}"
        )
    read = grammar.parse(said, UMM1, mode="strict")
    if read.diagnostics or read.calls:
        found = ", ".join(d.code for d in read.diagnostics) or "a call within a call"
        raise DataError(f"task call {part.name!r}: its payload {said[:60]!r} is not well formed ({found})")
    return Call(part.name, read.segments)


def said(parts: Iterable[C.Part]) -> Iterator[Said]:
    """The segments of a turn. Raises DataError as :func:`call_of` does."""
    parts = list(parts)
    k = 0
    while k < len(parts):
        part, k = parts[k], k + 1
        if isinstance(part, C.Text):
            yield Said(Text(part.text))
        elif isinstance(part, C.Box):
            if part.label:
                yield Said(Ref(part.label))
            yield Said(Boxes((part.xyxy,)))
        elif isinstance(part, C.Image):
            yield Said(None, image=part)
        else:
            call = call_of(part) if isinstance(part, C.TaskCall) else None
            masks = [] if call is not None else [part]
            while k < len(parts) and isinstance(parts[k], C.Mask) and (call is not None):
                masks.append(parts[k])
                k += 1
            if call is None:
                call = Call("image_seg", (Text(part.label),) if part.label else ())
            yield Said(Call(call.task, (*call.parts, *(Seg() for _ in masks))), tuple(masks))


def parts(answer: Answer, image: str | None, masks: Sequence[C.Mask | None] = ()) -> list[C.Part]:
    """The parts of a record that an answer stands for.

    Args:
        image: the picture that boxes outside of calls are about; without one they are words.
        masks: what each mark of the answer asks for, by ``Seg.at``; None where there is none.
    """
    found: list[C.Part] = []
    label = None
    for segment in answer.segments:
        match segment:
            case Text(text):
                if text.strip():
                    found.append(C.Text(text.strip()))
            case Ref(text):
                found.append(C.Text(text.strip()))
            case Boxes(boxes) if image is not None:
                if label is not None:
                    found.pop()
                found += [C.Box(image, tuple(box), label) for box in boxes]
            case Boxes() | Times():
                found.append(C.Text(grammar.render(Answer((segment,)), UMM1)))
            case Call():
                found.append(C.TaskCall(segment.task, {"payload": _words(segment)}))
                marks = (mark.at for mark in segment.masks)
                found += [masks[at] for at in marks if at < len(masks) and masks[at] is not None]
        label = segment.text.strip() if isinstance(segment, Ref) else None
    return found


def _words(call: Call) -> str:
    try:
        return payload(call)
    except ValueError:  # letters that look like a tag of ours, from a model of another dialect
        return payload(replace(call, parts=tuple(_defused(part) for part in call.parts)))


def _defused(part: grammar.Part) -> grammar.Part:
    if not isinstance(part, Text | Ref):
        return part
    return replace(part, text=part.text.replace("<", "(").replace("[", "("))
