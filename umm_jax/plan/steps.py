"""The compiled steps of a config, described: what to lower, and on what."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from umm_jax import config as configs
from umm_jax import families, sharding
from umm_jax.config import RunConfig
from umm_jax.train import state as states
from umm_jax.train.step import abstract_batch, make_step


class Step(NamedTuple):
    """A jitted function and the abstract arguments to lower it on; `plan` says where its state lies."""

    plan: states.Plan
    function: Any
    arguments: tuple

    def lower(self):
        return self.function.lower(*self.arguments)


def placements(run: RunConfig, devices: int) -> sharding.Report:
    """Where every parameter of `run` lies on so many devices, none of which is needed.

    Raises:
        ConfigError, DeviceError: what a run of it would be refused for.
    """
    family = families.get(run.family)
    model = configs.from_dict(family.config.ModelConfig, run.model, "config.model")
    mesh = sharding.abstract_mesh(run.mesh, devices)
    _, _, params = states.abstract_params(lambda rngs: family.model.build(model, rngs), mesh)
    return sharding.report(params, jax.tree.map(lambda leaf: leaf.sharding, params), mesh)


def train_step(run: RunConfig, devices: Sequence[jax.Device]) -> Step:
    """The training step of `run` on some devices, which need not be there.

    Raises:
        ConfigError, DeviceError: what a run of it would be refused for.
    """
    family = families.get(run.family)
    model = configs.from_dict(family.config.ModelConfig, run.model, "config.model")
    mesh = sharding.make_mesh(run.mesh, devices)
    plan = states.plan(lambda rngs: family.model.build(model, rngs), run, mesh)
    batch = abstract_batch(run, family.stream.spec(model), mesh)
    limit = jax.ShapeDtypeStruct((), np.float32, sharding=sharding.replicated(mesh))
    arguments = (plan.abstract, batch, *(limit,) * (run.train.anomaly == "skip"))
    return Step(plan, make_step(plan, run), arguments)
