"""Runs the steps of a plan: side by side where they need nothing of one another, each in its time.

| status | what became of a step |
|---|---|
| ok | an expert did it |
| degraded | an expert did it that stands in for a model |
| error | every expert failed, took too long, or gave what the task does not give |
| skipped | the step it takes from gave nothing |
| missing_input | there is nothing to work on: the user is to be asked |
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from umm_jax.markup.plan import Step, waves
from umm_jax.markup.tasks import TASKS
from umm_jax.router.experts import Expert, ExpertError, Medium, Registry, Request, Result, flaw

Status = Literal["ok", "degraded", "error", "skipped", "missing_input"]


@dataclass(frozen=True)
class Limits:
    """Of one answer.

    Attributes:
        seconds: of one expert's work; total: of all steps.
        numbers: of one medium, about 16 million pixels.
    """

    seconds: float = 120.0
    total: float = 600.0
    numbers: int = 50_000_000


@dataclass(frozen=True)
class Done:
    """What became of a step.

    Attributes:
        expert, version: who did it, or "".
        tried: what went wrong with whom before.
    """

    status: Status
    media: tuple[Medium, ...] = ()
    expert: str = ""
    version: str = ""
    note: str = ""
    seed: int = 0
    seconds: float = 0.0
    tried: tuple[str, ...] = ()

    @property
    def plain(self) -> dict[str, Any]:
        """For a manifest: all but the media themselves."""
        return {
            "status": self.status,
            "expert": self.expert,
            "version": self.version,
            "note": self.note,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "tried": list(self.tried),
            "gives": [medium.kind for medium in self.media],
        }


@dataclass
class Executor:
    """Runs plans with the experts of a registry.

    Attributes:
        chosen: task -> names of experts to ask first.
        strict: an error ends it with the wave it came in: what ran beside it is finished, so that the outcome
            does not hang on which was faster, and what would follow is skipped.
    """

    registry: Registry
    limits: Limits = field(default_factory=Limits)
    chosen: dict[str, Sequence[str]] = field(default_factory=dict)
    strict: bool = False

    def run(
        self,
        steps: Sequence[Step],
        media: Sequence[Medium] = (),
        seed: int = 0,
        regions: Mapping[int, np.ndarray] = {},
    ) -> list[Done]:
        """One :class:`Done` for each step; raises nothing for what an expert does.

        Args:
            media: what the user sent, in the order the plan was made with.
            regions: by step, bool [h, w] of what it works on: where it may change that. Without one the
                call's boxes say.
        """
        done: dict[int, Done] = {}
        end = time.monotonic() + self.limits.total
        for wave in waves(steps):
            threads = []
            stopped = self.strict and any(d.status == "error" for d in done.values())
            for k in wave:
                if stopped:
                    done[k] = Done("skipped", note="an earlier step failed")
                    continue
                given, early = self._given(steps[k], media, done)
                if early is not None:
                    done[k] = early
                    continue
                work = threading.Thread(
                    target=self._step,
                    args=(steps[k], given, regions.get(k), seed * 1009 + k, end, done),
                    daemon=True,
                )
                work.start()
                threads.append(work)
            for work in threads:
                work.join()
        return [done[k] for k in range(len(steps))]

    def _given(
        self, step: Step, media: Sequence[Medium], done: dict[int, Done]
    ) -> tuple[Medium | None, Done | None]:
        """What a step works on, or what becomes of it without having been run."""
        if step.missing:
            return None, Done("missing_input", note=step.missing)
        if step.takes is None:
            return None, None
        if step.takes.kind == "user":
            return media[step.takes.index], None
        source = done[step.takes.index]
        if not source.media:
            return None, Done("skipped", note=f"step{step.takes.index}, which it takes from, gave nothing")
        return source.media[-1], None

    def _step(self, step: Step, given: Medium | None, region, seed: int, end: float, done: dict) -> None:
        began, tried = time.monotonic(), []
        request = _request(step, given, region, seed)
        for expert in self.registry.chain(step.call.task, self.chosen.get(step.call.task, ())):
            left = min(self.limits.seconds, end - time.monotonic())
            if left <= 0:
                tried.append("no time is left")
                break
            result, wrong = _asked(expert, request, left)
            wrong = wrong or self._flaw(step, result)
            if wrong:
                tried.append(f"{expert.spec.name}: {wrong}")
                continue
            done[step.index] = Done(
                "degraded" if expert.spec.degraded else "ok",
                result.media,
                expert.spec.name,
                expert.spec.version,
                result.note,
                seed,
                time.monotonic() - began,
                tuple(tried),
            )
            return
        note = tried[-1] if tried else f"no expert for {step.call.task}"
        done[step.index] = Done(
            "error", note=note, seed=seed, seconds=time.monotonic() - began, tried=tuple(tried)
        )

    def _flaw(self, step: Step, result: Any) -> str:
        if not isinstance(result, Result) or not isinstance(result.media, tuple) or not result.media:
            return "gave no Result with media"
        for medium in result.media:
            if wrong := flaw(medium, self.limits.numbers):
                return f"gave {wrong}"
            if medium.kind != TASKS[step.call.task].gives:
                return f"gave {medium.kind} in place of {TASKS[step.call.task].gives}"
        return ""


def _request(step: Step, given: Medium | None, region: np.ndarray | None, seed: int) -> Request:
    call = step.call
    if region is None and given is not None and given.kind == "image" and call.boxes:
        region = box_mask(call.boxes, *given.value.shape[:2])
    return Request(call.task, step.prompt, call.boxes, call.times, call.objects, given, region, seed)


def box_mask(boxes: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """True where a pixel's middle lies in one of the boxes: bool [height, width]."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    inside = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes:
        inside |= ((y >= y0) & (y <= y1))[:, None] & ((x >= x0) & (x <= x1))[None]
    return inside


def _asked(expert: Expert, request: Request, seconds: float) -> tuple[Any, str]:
    """What an expert gave, and what went wrong. One that hangs is left behind in its thread."""
    found: list[tuple[Any, str]] = []

    def work() -> None:
        try:
            found.append((expert.run(request), ""))
        except ExpertError as error:
            found.append((None, str(error)))
        except BaseException as error:  # whatever other people's code does, the answer reaches the user
            found.append((None, f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else (None, f"took longer than {seconds:.3g} s")
