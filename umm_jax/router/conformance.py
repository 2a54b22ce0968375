"""What every expert must do, ours and others': checks by name, and what is wrong where one fails.

from umm_jax.router.conformance import failures
assert not failures(MyExpert())
"""

from collections.abc import Callable, Iterator

import numpy as np

from umm_jax.markup.coordinates import Box
from umm_jax.markup.tasks import TASKS
from umm_jax.router.execute import box_mask
from umm_jax.router.experts import Expert, ExpertError, Medium, Request, Result, Spec, flaw

BOX: Box = (0.25, 0.25, 0.75, 0.75)
MOST = 50_000_000
# Words that any expert of a task should make something of.
PROMPTS = {
    "image_gen": "a red circle",
    "layout_gen": "a red circle",
    "image_edit": "make the circle blue",
    "image_seg": "the circle",
    "image_ground": "the circle",
    "video_gen": "a red circle moves",
    "video_edit": "make the circle blue",
    "video_seg": "the circle",
    "audio_gen": "a low tone",
    "image_to_video": "the circle moves",
    "audio_edit": "louder",
}


def sample(kind: str) -> Medium:
    """A red circle on white; a second of a tone."""
    y, x = np.mgrid[:48, :64]
    circle = (y - 24) ** 2 + (x - 32) ** 2 < 100
    image = np.where(circle[..., None], np.uint8((220, 30, 30)), np.uint8(255))
    match kind:
        case "image":
            return Medium("image", image)
        case "video":
            return Medium("video", np.stack([np.roll(image, k, axis=1) for k in range(4)]))
    return Medium("audio", np.sin(np.arange(16_000) / 10).astype(np.float32) / 2)


def request(task: str, boxed: bool = True, seed: int = 0) -> Request:
    """Something that an expert of this task is asked for."""
    takes = TASKS[task].takes
    medium = None if takes is None else sample(takes)
    region = box_mask([BOX], *medium.value.shape[:2]) if boxed and takes == "image" else None
    objects = (("a red circle", (BOX,)),) if task == "layout_gen" else ()
    return Request(task, PROMPTS[task], (BOX,) if boxed else (), (), objects, medium, region, seed)


def failures(expert: Expert) -> list[str]:
    """ "task: check: what was wrong" of every check that fails; nothing where all is well."""
    if not isinstance(expert, Expert) or not isinstance(getattr(expert, "spec", None), Spec):
        return ["spec: no Expert: it needs spec (a Spec), run and close"]
    found = []
    for task in sorted(expert.spec.tasks):
        for name, check in CHECKS.items():
            try:
                found += [f"{task}: {name}: {wrong}" for wrong in check(expert, task)]
            except Exception as error:
                found.append(f"{task}: {name}: raised {type(error).__name__}: {error}")
    return found


def _kinds(expert: Expert, task: str) -> Iterator[str]:
    """What is given is of the task's kind, in the form of its kind."""
    result = expert.run(request(task))
    if not isinstance(result, Result) or not result.media:
        yield "gave no Result with media"
        return
    for medium in result.media:
        if wrong := flaw(medium, MOST):
            yield f"gave {wrong}"
        elif medium.kind != TASKS[task].gives:
            yield f"gave {medium.kind} in place of {TASKS[task].gives}"


def _again(expert: Expert, task: str) -> Iterator[str]:
    """The same request gives the same result."""
    first, second = (expert.run(request(task, seed=7)) for _ in range(2))
    if len(first.media) != len(second.media) or not all(
        np.array_equal(a.value, b.value) for a, b in zip(first.media, second.media)
    ):
        yield "another result for the same request and seed"


def _untouched(expert: Expert, task: str) -> Iterator[str]:
    """What it is given is not changed."""
    asked = request(task)
    before = None if asked.medium is None else asked.medium.value.copy()
    expert.run(asked)
    if before is not None and not np.array_equal(before, asked.medium.value):
        yield "the request's medium was changed"


def _outside(expert: Expert, task: str) -> Iterator[str]:
    """An edit of a region leaves every pixel outside it as it was."""
    if task != "image_edit":
        return
    asked = request(task)
    (edited, *_) = expert.run(asked).media
    if edited.value.shape != asked.medium.value.shape:
        yield f"gave a picture of {edited.value.shape} for one of {asked.medium.value.shape}"
    elif (edited.value != asked.medium.value)[~asked.region].any():
        yield "pixels outside the region changed"


def _size(expert: Expert, task: str) -> Iterator[str]:
    """A mask is of its picture's size."""
    if task != "image_seg":
        return
    asked = request(task)
    for mask in expert.run(asked).media:
        if mask.value.shape != asked.medium.value.shape[:2]:
            yield f"a mask of {mask.value.shape} for a picture of {asked.medium.value.shape[:2]}"


def _missing(expert: Expert, task: str) -> Iterator[str]:
    """What it cannot do without is asked for by ExpertError."""
    if task not in expert.spec.needs_box:
        return
    try:
        expert.run(request(task, boxed=False))
    except ExpertError:
        return
    yield "no ExpertError where a box is missing, which it says it needs"


CHECKS: dict[str, Callable[[Expert, str], Iterator[str]]] = {
    "kinds": _kinds,
    "same again": _again,
    "request untouched": _untouched,
    "outside untouched": _outside,
    "size": _size,
    "missing input": _missing,
}
