"""From OptimConfig to parameter updates: schedule, groups, AdamW, Muon, frozen parameters.

Parameters are nested dicts; a parameter is named by its '/'-joined path. The first group whose substring
occurs in the path owns it. The direction of a step comes from optax, one transformation for each group and
rule; the learning rate is applied here from the step counter of the train state, so that there is one
counter and one schedule:

    p <- p - lr(step) * lr_scale * (direction + weight_decay * p)

Muon (momentum, Nesterov look-ahead, Newton-Schulz orthogonalisation; K. Jordan 2024) sees every parameter
as a matrix [in, out]: a convolution kernel [k, k, in, out] as (k*k*in) x out, a stacked parameter
[layers, ...] as one matrix for each layer. Its direction is scaled by 0.2 sqrt(max(in, out)), which gives it
the root mean square of an Adam step (Liu et al. 2025, arXiv 2502.16982). Its matrices are what a layer
multiplies by: the parameters called ``kernel``. Vectors, tables of positions, queries and other learned
inputs, and everything along ``vocab`` (embedding and output head) take Adam with the same learning rate, and
no decay unless the group says ``decay_vectors``.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from umm_jax.config import GroupConfig, OptimConfig
from umm_jax.errors import ConfigError

Tree = dict[str, Any]

MUON_RMS = 0.2


# --- trees ----------------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> {'/'-joined path: leaf}; the inverse is :func:`unflatten`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        found.update(flatten(value, name) if isinstance(value, Mapping) else {name: value})
    return found


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """{'/'-joined path: leaf} -> nested dicts."""
    tree: Tree = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


# --- schedule -------------------------------------------------------------------------------------


def schedule(config: OptimConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of step 0, 1, ... `steps` - 1; the shapes are described at OptimConfig."""

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        rate = jnp.minimum(1.0, (step + 1) / max(config.warmup, 1))
        if config.schedule == "cosine":
            done = jnp.clip((step - config.warmup) / max(steps - config.warmup, 1), 0.0, 1.0)
            rate *= 0.5 * (1 + jnp.cos(math.pi * done))
        elif config.schedule == "trapezoid":
            rate *= jnp.clip((steps - step) / max(config.decay * steps, 1.0), 0.0, 1.0)
        return config.lr * rate

    return lr


# --- what happens to each parameter -----------------------------------------------------------------


def matrix_dims(path: str, axes: tuple[str | None, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Which dimensions Muon reads as [in, out], or None where the parameter is not Muon's."""
    first = 1 if axes and axes[0] == "layers" else 0
    if path.split("/")[-1] != "kernel" or len(axes) - first < 2 or "vocab" in axes:
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, len(axes) - 1)), (len(axes) - 1,))


def is_vector(axes: tuple[str | None, ...]) -> bool:
    """Fewer than two dimensions, the layers axis not counted."""
    return len([a for a in axes if a != "layers"]) < 2


@dataclass(frozen=True)
class Rule:
    """One optax transformation and the parameters it moves."""

    name: str
    group: GroupConfig
    paths: tuple[str, ...]
    transform: optax.GradientTransformation
    decayed: frozenset[str]


class Optimizer:
    """Splits parameters, makes the optimizer state and applies a step.

    Args:
        config: the schedule, moments and groups.
        steps: length of the schedule.
        axes: {path: logical axes} of every parameter, from ``sharding.logical_axes``.
        only: a predicate on paths; parameters it refuses are frozen whatever their group says.

    Raises:
        ConfigError: a parameter no group matches, or nothing left to train.
    """

    def __init__(
        self,
        config: OptimConfig,
        steps: int,
        axes: Mapping[str, tuple[str | None, ...]],
        only: Callable[[str], bool] = lambda path: True,
    ):
        self.config, self.lr = config, schedule(config, steps)
        owned: dict[tuple[int, str], list[str]] = {}
        for path, names in axes.items():
            index = next((i for i, g in enumerate(config.groups) if owns(g, path)), None)
            if index is None:
                raise ConfigError(
                    f"no group of optim.groups matches parameter {path}; add a group with match=[]"
                )
            kind = config.groups[index].optimizer if only(path) else "frozen"
            if kind == "muon" and matrix_dims(path, names) is None:
                kind = "adam"
            owned.setdefault((index, kind), []).append(path)
        self.frozen = frozenset(p for (_, kind), paths in owned.items() if kind == "frozen" for p in paths)
        self.rules = tuple(
            self._rule(index, kind, paths, axes)
            for (index, kind), paths in sorted(owned.items())
            if kind != "frozen"
        )
        if not self.rules:
            raise ConfigError("every parameter is frozen: there is nothing to train")

    def _rule(self, index: int, kind: str, paths: list[str], axes) -> Rule:
        config, group = self.config, self.config.groups[index]
        if kind == "muon":
            dims = {path: matrix_dims(path, axes[path]) for path in paths}
            transform = optax.chain(
                optax.contrib.scale_by_muon(
                    ns_steps=config.muon_ns_steps,
                    beta=config.muon_momentum,
                    nesterov=True,
                    weight_dimension_numbers=unflatten(dims),
                ),
                optax.stateless(lambda updates, _: _match_adam_rms(updates, dims)),
            )
            decayed = set(paths)
        else:
            transform = optax.scale_by_adam(config.b1, config.b2, config.eps)
            # The rest of a muon group ("adam") is its vectors and tables.
            decayed = {
                p for p in paths if group.decay_vectors or (kind == "adamw" and not is_vector(axes[p]))
            }
        if group.weight_decay == 0:
            decayed = set()
        return Rule(f"group{index}_{kind}", group, tuple(paths), transform, frozenset(decayed))

    def describe(self, params: Tree) -> list[str]:
        """One line for each rule: name, parameters, how many of them are decayed."""
        flat = flatten(params)
        sizes = {path: math.prod(leaf.shape) for path, leaf in flat.items()}
        lines = [
            f"{rule.name}: {len(rule.paths)} arrays, {sum(sizes[p] for p in rule.paths):,} parameters, "
            f"lr x {rule.group.lr_scale:g}, weight decay {rule.group.weight_decay:g} on {len(rule.decayed)}"
            for rule in self.rules
        ]
        if self.frozen:
            lines.append(
                f"frozen: {len(self.frozen)} arrays, {sum(sizes[p] for p in self.frozen):,} parameters"
            )
        return lines

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(trainable, frozen) parts of a parameter tree."""
        flat = flatten(params)
        return (
            unflatten({p: v for p, v in flat.items() if p not in self.frozen}),
            unflatten({p: v for p, v in flat.items() if p in self.frozen}),
        )

    @staticmethod
    def merge(trainable: Tree, frozen: Tree) -> Tree:
        """The inverse of :meth:`split`; also lays averaged weights over the full tree."""
        return unflatten({**flatten(frozen), **flatten(trainable)})

    def init(self, params: Tree) -> Tree:
        """The optimizer state: {rule name: optax state over that rule's parameters}."""
        flat = flatten(params)
        return {r.name: r.transform.init(unflatten({p: flat[p] for p in r.paths})) for r in self.rules}

    def apply(self, grads: Tree, opt: Tree, trainable: Tree, step: jax.Array) -> tuple[Tree, Tree, dict]:
        """One step down the gradients.

        Args:
            grads, trainable: trees of the same paths, the trainable part of the parameters.
            opt: the state of :meth:`init`.
            step: the number of steps done so far.

        Returns:
            new trainable parameters, new optimizer state, {"lr", "grad_norm"} (the norm before clipping).
        """
        norm, lr = optax.tree.norm(grads), self.lr(step)
        if self.config.clip is not None:
            factor = self.config.clip / jnp.maximum(norm, self.config.clip)
            grads = jax.tree.map(lambda g: g * factor, grads)
        flat, flat_grads, state = flatten(trainable), flatten(grads), {}
        for rule in self.rules:
            mine = unflatten({p: flat_grads[p] for p in rule.paths})
            directions, state[rule.name] = rule.transform.update(mine, opt[rule.name])
            for path, direction in flatten(directions).items():
                value = flat[path]
                if path in rule.decayed:
                    direction = direction + rule.group.weight_decay * value
                flat[path] = (value - lr * rule.group.lr_scale * direction).astype(value.dtype)
        return unflatten(flat), state, {"lr": lr, "grad_norm": norm}


def owns(group: GroupConfig, path: str) -> bool:
    return not group.match or any(text in path for text in group.match)


def _match_adam_rms(updates: Tree, dims: Mapping[str, optax.contrib.MuonDimensionNumbers]) -> Tree:
    def scale(path, update):
        fan_in = math.prod(update.shape[i] for i in dims[path].reduction_axis)
        return update * (MUON_RMS * math.sqrt(max(fan_in, update.shape[-1])))

    return unflatten({path: scale(path, update) for path, update in flatten(updates).items()})
