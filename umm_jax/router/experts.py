"""What an expert is: what it says of itself, what it is given, what it gives; and how one is found.

An expert is a class without arguments that offers :class:`Expert`. Ours are named in ``SHIPPED``; those of
other packages by entry points of the group ``umm.experts``, ``name = package.module:Class``. What each must
pass is in ``conformance.py``.
"""

import importlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import PIL.Image

from umm_jax.config import suggest
from umm_jax.errors import ConfigError
from umm_jax.markup.coordinates import Box
from umm_jax.markup.tasks import TASKS

GROUP = "umm.experts"
SHIPPED = {
    "classical.edit": "umm_jax.router.classical:Edit",
    "classical.segment": "umm_jax.router.classical:Segment",
    "classical.shapes": "umm_jax.router.classical_media:Shapes",
    "classical.motion": "umm_jax.router.classical_media:Motion",
    "classical.film": "umm_jax.router.classical_media:Film",
    "classical.sound": "umm_jax.router.classical_media:Sound",
    "adapters.diffusers": "umm_jax.router.adapters:Diffusers",
    "adapters.sam": "umm_jax.router.adapters:Sam",
}


class Medium(NamedTuple):
    """Something that is seen or heard.

    | kind | value |
    |---|---|
    | image | uint8 [h, w, 3] |
    | mask | bool [h, w] |
    | boxes | a tuple of boxes |
    | video | uint8 [t, h, w, 3] |
    | track | bool [t, h, w] |
    | audio | float32 [n], from -1 to 1, 16 kHz |
    """

    kind: str
    value: Any


_FORMS = {
    "image": (np.uint8, 3),
    "mask": (np.bool_, 2),
    "video": (np.uint8, 4),
    "track": (np.bool_, 3),
    "audio": (np.float32, 1),
}


def _is_box(found: Any) -> bool:
    numbers = isinstance(found, tuple) and all(isinstance(v, (int, float, np.number)) for v in found)
    return numbers and len(found) == 4 and all(0 <= v <= 1 for v in found)


def flaw(medium: Any, most: int) -> str:
    """What is wrong with a medium that an expert gave; "" where nothing is. `most` numbers may it hold."""
    if not isinstance(medium, Medium):
        return f"a {type(medium).__name__} in place of a Medium"
    if medium.kind == "boxes":
        boxes = medium.value
        good = isinstance(boxes, tuple) and all(map(_is_box, boxes))
        return "" if good else "boxes that are not tuples of four shares"
    if medium.kind not in _FORMS:
        return f"a medium of unknown kind {str(medium.kind)[:80]!r}"
    dtype, dims = _FORMS[medium.kind]
    value = medium.value
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != dims:
        found = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
        return f"{medium.kind}: {found} in place of {np.dtype(dtype).name} of {dims} dimensions"
    if medium.kind in ("image", "video") and value.shape[-1] != 3:
        return f"{medium.kind} of {value.shape[-1]} channels"
    if not 0 < value.size <= most:
        return f"{medium.kind} of {value.size} numbers, at most {most} are allowed"
    if medium.kind == "audio" and not np.isfinite(value).all():
        return "audio that is not finite"
    return ""


@dataclass(frozen=True)
class Spec:
    """What an expert says of itself.

    Attributes:
        tasks: names of ``tasks.TASKS``.
        needs_box: of the tasks, those it cannot do without a box.
        degraded: it stands in for a model; results are marked so.
        priority: of several experts of a task the highest is asked first.
    """

    name: str
    version: str
    tasks: frozenset[str]
    needs_box: frozenset[str] = frozenset()
    degraded: bool = False
    priority: int = 0

    def __post_init__(self):
        if unknown := set(self.tasks) - set(TASKS):
            raise ConfigError(
                f"expert {self.name}: no tasks {', '.join(sorted(unknown))}; they are in tasks.py"
            )


@dataclass(frozen=True)
class Request:
    """What an expert is given.

    Attributes:
        medium: what it works on; None for tasks that take nothing.
        region: bool [h, w]: what may change, or where to look; None for all of it.
        seed: of all that is drawn: the same request gives the same result.
    """

    task: str
    prompt: str
    boxes: tuple[Box, ...] = ()
    times: tuple[tuple[float, float], ...] = ()
    objects: tuple[tuple[str, tuple[Box, ...]], ...] = ()
    medium: Medium | None = None
    region: np.ndarray | None = None
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What an expert gives: media of the kind its task gives, and what there is to say of them."""

    media: tuple[Medium, ...]
    note: str = ""


def pasted(drawn: np.ndarray, request: Request) -> np.ndarray:
    """A picture uint8 [h, w, 3] made from the request's, in its size; inside its region, where it has one."""
    if request.medium is None:
        return drawn
    before = request.medium.value
    height, width = before.shape[:2]
    if drawn.shape[:2] != (height, width):
        picture = PIL.Image.fromarray(drawn).resize((width, height), PIL.Image.Resampling.BICUBIC)
        drawn = np.asarray(picture)
    return drawn if request.region is None else np.where(request.region[..., None], drawn, before)


class ExpertError(Exception):
    """An expert cannot do what it was asked; the text says why."""


@runtime_checkable
class Expert(Protocol):
    spec: Spec

    def run(self, request: Request) -> Result:
        """Raises ExpertError where it cannot do this."""

    def close(self) -> None:
        """Gives up what it holds."""


def _loaded(name: str, place: EntryPoint | str) -> Expert:
    """Raises ConfigError: it cannot be loaded, or is no expert."""
    try:
        if isinstance(place, str):
            module, _, attribute = place.partition(":")
            made = getattr(importlib.import_module(module), attribute)()
        else:
            made = place.load()()
    except ConfigError as error:
        raise ConfigError(f"expert {name!r}: {error}") from None
    except Exception as error:  # other people's code
        raise ConfigError(f"expert {name!r} cannot be loaded: {type(error).__name__}: {error}") from None
    if not isinstance(made, Expert) or not isinstance(made.spec, Spec):
        raise ConfigError(f"expert {name!r}: {type(made).__name__} is no Expert (spec, run, close)")
    return made


@dataclass
class Registry:
    """Experts by name, made when first asked for."""

    places: Mapping[str, EntryPoint | str] = field(default_factory=dict)
    _made: dict[str, Expert] = field(default_factory=dict)
    _failed: dict[str, ConfigError] = field(default_factory=dict)
    # Steps of a plan ask at the same time; a model is loaded once.
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @classmethod
    def installed(cls) -> "Registry":
        """Ours, and those of installed packages."""
        found: dict[str, EntryPoint | str] = dict(SHIPPED)
        found |= {point.name: point for point in entry_points(group=GROUP)}
        return cls(found)

    def add(self, expert: Expert) -> None:
        self._made[expert.spec.name] = expert

    @property
    def names(self) -> list[str]:
        return sorted({*self.places, *self._made})

    def get(self, name: str) -> Expert:
        """Raises ConfigError where there is none of this name, or it cannot be loaded, now or before."""
        with self._lock:
            if name not in self._made:
                if name in self._failed:
                    raise self._failed[name]
                if name not in self.places:
                    raise ConfigError(f"expert {name!r} is unknown{suggest(name, self.names)}")
                try:
                    self._made[name] = _loaded(name, self.places[name])
                except ConfigError as error:
                    self._failed[name] = error
                    raise
            return self._made[name]

    def chain(self, task: str, chosen: Sequence[str] = ()) -> list[Expert]:
        """Those who do a task, the chosen ones first, then by priority and name."""
        able = [e for e in self._able() if task in e.spec.tasks]
        first = {name: k for k, name in enumerate(chosen)}

        def order(expert: Expert) -> tuple:
            name = expert.spec.name
            return first.get(name, len(first)), -expert.spec.priority, name

        return sorted(able, key=order)

    def _able(self) -> Iterable[Expert]:
        for name in self.names:
            try:
                yield self.get(name)
            except ConfigError:
                continue  # told by `umm experts`; a broken package must not stop the others

    def close(self) -> None:
        for expert in self._made.values():
            expert.close()
        self._made.clear()
