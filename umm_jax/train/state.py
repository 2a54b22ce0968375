"""The train state: one plain pytree, described before it is made, and made where it will lie.

    {"step": int32 scalar, "params": {...}, "opt": {...}, "ema": {...}}

``params`` holds every parameter, frozen ones too; ``opt`` and ``ema`` only know trainable ones (``ema`` is {}
when no average is kept). All of it is float32, whatever dtype the activations have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from umm_jax import compiler, sharding
from umm_jax.config import RunConfig
from umm_jax.models.layers import Keys
from umm_jax.train.optimizer import Optimizer, Tree, flatten, unflatten

TrainState = dict[str, Any]


def is_autoencoder(path: str) -> bool:
    """Whether a parameter belongs to the image autoencoder (a module called ``autoencoder``)."""
    return "autoencoder" in path.split("/")


@dataclass(frozen=True)
class Plan:
    """All that is known of a run's state before any array exists.

    Attributes:
        build: makes the model from random streams.
        graphdef: the model without its parameters.
        optimizer: knows which parameters are trained and how.
        abstract: the state as ShapeDtypeStructs that carry their sharding; what a restore is given.
        mesh: where it lies.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    graphdef: Any
    optimizer: Optimizer
    abstract: TrainState
    mesh: Any

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def report(self) -> sharding.Report:
        """Where every array of the state lies."""
        return sharding.report(self.abstract, self.shardings, self.mesh)


def abstract_params(build: Callable[[nnx.Rngs], nnx.Module], mesh) -> tuple[Any, nnx.State, Tree]:
    """(graphdef, abstract model state with metadata, abstract parameters with shardings), no array made."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(Keys(0))))
    placed = sharding.shardings(state, mesh)
    return graphdef, state, _with_shardings(nnx.to_pure_dict(state), placed)


def plan(build: Callable[[nnx.Rngs], nnx.Module], run: RunConfig, mesh) -> Plan:
    """Describes the state of `run` for the model `build` makes.

    Raises:
        ConfigError: the optimizer groups leave a parameter without an owner, or train nothing.
    """
    graphdef, state, params = abstract_params(build, mesh)
    asked = is_autoencoder if run.train.objective == "autoencoder" else lambda path: True
    kept = sharding.fixed(state)
    only = lambda path: asked(path) and path not in kept  # noqa: E731
    optimizer = Optimizer(run.optim, run.train.steps, sharding.logical_axes(state), only)
    shapes = jax.eval_shape(lambda p: _fresh(p, optimizer, run), params)
    homes = {path: (leaf.shape, leaf.sharding) for path, leaf in flatten(params).items()}
    whole = sharding.replicated(mesh)

    def place(path, leaf):
        # Moments and averages lie with their parameter: the last dict keys of their path are its path.
        names: list[str] = []
        for key in reversed(path):
            if not isinstance(key, jax.tree_util.DictKey):
                break
            names.insert(0, key.key)
        for start in range(len(names)):
            shape, home = homes.get("/".join(names[start:]), (None, None))
            if shape == leaf.shape:
                return home
        return whole

    return Plan(
        build,
        graphdef,
        optimizer,
        _with_shardings(shapes, jax.tree_util.tree_map_with_path(place, shapes)),
        mesh,
    )


def init(plan: Plan, run: RunConfig) -> TrainState:
    """The state at step 0, every shard made on the device that keeps it."""

    def create():
        params = nnx.to_pure_dict(nnx.split(plan.build(Keys(run.train.seed)))[1])
        return _fresh(params, plan.optimizer, run)

    # Random numbers for a hundred arrays are a large program that runs once: on CPU, optimising it costs six
    # times what it takes to compile it plainly, and the bits are the same.
    options = compiler.once(plan.mesh.devices.flat)
    return jax.jit(create, out_shardings=plan.shardings, compiler_options=options)()


def with_params(plan: Plan, run: RunConfig, params: Tree) -> TrainState:
    """The state at step 0 around given parameters (same tree as the plan's); takes them over."""
    return jax.jit(lambda p: _fresh(p, plan.optimizer, run), out_shardings=plan.shardings)(params)


def eval_params(state: TrainState, weights: str = "raw") -> Tree:
    """Parameters to reply with: "raw", or "ema": the averages, and what is frozen as it is."""
    if weights == "raw":
        return state["params"]
    return unflatten({**flatten(state["params"]), **flatten(state["ema"])})


def _fresh(params: Tree, optimizer: Optimizer, run: RunConfig) -> TrainState:
    trainable, _ = optimizer.split(params)
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt": optimizer.init(trainable),
        "ema": {} if run.train.ema is None else jax.tree.map(jnp.copy, trainable),
    }


def _with_shardings(shapes: Any, placed: Any) -> Any:
    return jax.tree.map(
        lambda leaf, home: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=home), shapes, placed
    )
