"""Many plans of one config: meshes, batch sizes and rematerialisation policies, and the best that fits."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from umm_jax.config import RunConfig
from umm_jax.errors import ConfigError, UserError
from umm_jax.plan.estimate import Report

POLICIES = ("none", "dots_attention", "dots_no_batch", "dots", "attention", "full")


@dataclass(frozen=True)
class Choice:
    """A combination: sizes of the mesh, rows of a batch on each device, policy (None: the config's)."""

    mesh: dict[str, int]
    rows: int
    remat: str | None

    def __str__(self) -> str:
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1)
        return f"{mesh or 'one device'}, {self.rows} rows a device, remat {self.remat or 'of the config'}"


@dataclass(frozen=True)
class Tried:
    """What became of a choice: a report, or why there is none."""

    choice: Choice
    report: Report | None
    why: str = ""

    @property
    def rate(self) -> float:
        """Tokens a second of all devices, estimated; 0 where it does not fit."""
        if self.report is None or self.report.estimate is None:
            return 0.0
        return self.report.tokens / self.report.estimate.seconds


def meshes(
    devices: int, tensors: Sequence[int], datas: Sequence[int], sequences: Sequence[int] = (1,)
) -> list[dict[str, int]]:
    """Every mesh with these sizes of tensor, data and sequence whose fsdp is what is left."""
    found = []
    for data, tensor, sequence in itertools.product(datas, tensors, sequences):
        taken = data * tensor * sequence
        if devices % taken == 0:
            found.append({"data": data, "fsdp": devices // taken, "tensor": tensor, "sequence": sequence})
    if not found:
        raise ConfigError(
            f"none of data {list(datas)}, tensor {list(tensors)} and sequence {list(sequences)} divides "
            f"{devices} devices"
        )
    return found


def applied(run: RunConfig, choice: Choice) -> RunConfig:
    """`run` as a choice has it. The rows of a batch are shared by the axes data and fsdp."""
    rows = choice.rows * choice.mesh["data"] * choice.mesh["fsdp"]
    model = run.model if choice.remat is None else with_policy(run.model, choice.remat)
    return dataclasses.replace(
        run,
        model=model,
        mesh=dataclasses.replace(run.mesh, **choice.mesh),
        data=dataclasses.replace(run.data, batch_size=rows),
    )


def with_policy(model: Any, policy: str) -> Any:
    """A complete `model` section with every ``remat`` of it set."""
    if not isinstance(model, dict):
        return model
    return {key: policy if key == "remat" else with_policy(value, policy) for key, value in model.items()}


def sweep(
    run: RunConfig,
    choices: Sequence[Choice],
    plan: Callable[[RunConfig], Report],
    say: Callable[[str], None],
) -> Iterator[Tried]:
    """Tries them one by one. Where a policy's rows do not fit, more rows are not tried.

    Args:
        plan: makes a report of a config.
    """
    too_many: dict[tuple, int] = {}
    for choice in choices:
        kind = (tuple(choice.mesh.items()), choice.remat)
        if choice.rows >= too_many.get(kind, choice.rows + 1):
            yield Tried(choice, None, f"{too_many[kind]} rows do not fit")
            continue
        say(str(choice))
        try:
            found = plan(applied(run, choice))
        except UserError as error:
            yield Tried(choice, None, str(error))
            continue
        if not found.fits:
            too_many[kind] = choice.rows
        yield Tried(choice, found, "" if found.fits else "does not fit")


def table(tried: Sequence[Tried]) -> list[str]:
    """One line for each, and the best."""
    out = [f"{'fits':5} {'peak GiB':>9} {'s/step':>8} {'tokens/s/dev':>13} {'% peak':>7}  choice"]
    for one in tried:
        r = one.report
        if r is None:
            out.append(f"{'-':5} {'':>9} {'':>8} {'':>13} {'':>7}  {one.choice}: {one.why}")
        elif not r.fits:
            out.append(f"{'no':5} {r.facts['needs'] / 2**30:9.2f} {'':>8} {'':>13} {'':>7}  {one.choice}")
        else:
            peak, e = r.facts["memory"]["peak_memory"] / 2**30, r.estimate
            timed = f"{'':>8} {'':>13} {'':>7}"
            if e is not None:
                timed = f"{e.seconds:8.3f} {one.rate / r.devices:13,.0f} {100 * r.utilisation:7.1f}"
            out.append(f"{'yes':5} {peak:9.2f} {timed}  {one.choice}")
    best = max(tried, key=lambda t: t.rate, default=None)
    if best is None or not best.rate:
        out.append("best: none of these fits; try fewer rows, remat full, or more chips")
    else:
        out.append(f"best: {best.choice} (by the estimate)")
    return out
