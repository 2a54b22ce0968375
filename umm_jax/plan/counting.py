"""Model FLOPs of a training step by part: what its formulas ask for, whatever a program makes of them.

The step is traced with nothing made again and with attention as its definition stands (``layers.plainly``),
and the products of matrices and convolutions are counted. Two FLOPs for a product and its sum; half of the
square of a backbone's attention, whose tokens form a stream, the whole of it elsewhere; gradients where there
are some to compute, so none of weights that are frozen. Elementwise work and the optimizer are left out.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

from umm_jax.models.attention import SCOPE
from umm_jax.models.layers import PARTS, plainly
from umm_jax.plan import hlo
from umm_jax.plan.steps import Step

OTHER, OPTIMIZER = "other", "optimizer"
_PART = re.compile(rf"(?:^|[/(])({'|'.join((*PARTS, OPTIMIZER))})(?=[)/]|$)")
_ATTENTION = re.compile(rf"(?:^|[/(]){SCOPE}(?=[)/]|$)")


@dataclass(frozen=True)
class Work:
    """FLOPs of one part over a whole batch: of its values, and of its gradients."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward


def part_of(op_name: str) -> str:
    """The part of a model that an operation belongs to, by its name in the program: the innermost."""
    found = _PART.findall(op_name)
    return found[-1] if found else OTHER


def is_backward(op_name: str) -> bool:
    """Whether an operation, by its name, is of the gradients (what is made again for them is, too)."""
    return "transpose(" in op_name or "rematted_computation" in op_name


def model_flops(step: Step) -> dict[str, Work]:
    """{part: Work} of a step over its whole batch, largest first.

    Args:
        step: made for one device, so that what is counted is the whole.
    """
    with plainly():
        lowered = step.lower()
    program = hlo.parse(lowered.as_text("hlo", debug_info=True))
    if program.unknown_loops:
        raise hlo.Unreadable(f"loops whose turns are not known: {', '.join(program.unknown_loops)}")
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, flops in program.flops_by_name().items():
        part = part_of(name)
        share = 0.5 if part == "backbone" and _ATTENTION.search(name) else 1.0
        sums[part][is_backward(name)] += share * flops
    sums.pop(OPTIMIZER, None)
    return {part: Work(*pair) for part, pair in sorted(sums.items(), key=lambda item: -sum(item[1]))}
