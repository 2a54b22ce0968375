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

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
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


Axes = tuple[str | None, ...]


def is_vector(axes: Axes) -> bool:
    """Fewer than two dimensions, the layers axis not counted."""
    return len([a for a in axes if a != "layers"]) < 2


def is_matrix(path: str, axes: Axes) -> bool:
    """Whether a parameter is Muon's: what a layer multiplies by, except along the vocabulary."""
    return path.split("/")[-1] == "kernel" and not is_vector(axes) and "vocab" not in axes


def matrix_shape(shape: Sequence[int], axes: Axes) -> tuple[int, int, int]:
    """(layers, in, out) as Muon reads a parameter: everything but layers and the last dimension is input."""
    layers = shape[0] if axes[0] == "layers" else 1
    return layers, math.prod(shape[:-1]) // layers, shape[-1]


# --- Muon -----------------------------------------------------------------------------------------

# Newton-Schulz x -> a x + b (x x^T) x + c (x x^T)^2 x brings singular values near 1 (within about 0.7 and
# 1.2) in few rounds; the coefficients are K. Jordan's, https://kellerjordan.github.io/posts/muon.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(x: jax.Array, rounds: int) -> jax.Array:
    """The nearest semi-orthogonal matrix, roughly, of each of [n, in, out]."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    x = x.swapaxes(1, 2) if tall else x
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)

    def polish(_, x):
        gram = x @ x.swapaxes(1, 2)
        return a * x + (b * gram + c * gram @ gram) @ x

    # A loop, not unrolled: with a hundred kernels these products are a third of the program to compile.
    x = jax.lax.fori_loop(0, rounds, polish, x)
    return x.swapaxes(1, 2) if tall else x


def muon(axes: Mapping[str, Axes], momentum: float, rounds: int) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum with the root mean square of an Adam step.

    Kernels of equal shape and equal axis names (hence equal placement) are orthogonalised together.

    Args:
        axes: {path: logical axes} of the parameters, all of them kernels.
        momentum: decay of the running mean of gradients.
        rounds: of Newton-Schulz.
    """

    def init(params: Tree) -> Tree:
        return {"momentum": jax.tree.map(jnp.zeros_like, params)}

    def update(grads: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
        del params
        mean = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, state["momentum"], grads)
        ahead = flatten(jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, mean, grads))
        together: dict[Any, list[str]] = {}
        for path, x in ahead.items():
            names = tuple(a for a in axes[path] if a != "layers")
            together.setdefault((matrix_shape(x.shape, axes[path])[1:], names), []).append(path)
        updates = {}
        for ((fan_in, fan_out), _), paths in together.items():
            stacks = [ahead[p].reshape(-1, fan_in, fan_out) for p in paths]
            x = orthogonalize(jnp.concatenate(stacks), rounds) * (MUON_RMS * math.sqrt(max(fan_in, fan_out)))
            ends = list(itertools.accumulate(len(s) for s in stacks))
            for path, part in zip(paths, jnp.split(x, ends[:-1])):
                updates[path] = part.reshape(ahead[path].shape)
        return unflatten(updates), {"momentum": mean}

    return optax.GradientTransformation(init, update)


# --- groups ---------------------------------------------------------------------------------------


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
        axes: Mapping[str, Axes],
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
            if kind == "muon" and not is_matrix(path, names):
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

    def _rule(self, index: int, kind: str, paths: list[str], axes: Mapping[str, Axes]) -> Rule:
        config, group = self.config, self.config.groups[index]
        if kind == "muon":
            transform = muon({p: axes[p] for p in paths}, config.muon_momentum, config.muon_ns_steps)
            decayed = set(paths)
        else:
            transform = optax.scale_by_adam(config.b1, config.b2, config.eps)
            # The rest of a muon group ("adam") is its vectors and tables.
            decayed = {
                p for p in paths if group.decay_vectors or (kind == "adamw" and not is_vector(axes[p]))
            }
        if group.weight_decay == 0:
            decayed = set()
        decayed = {p for p in decayed if not any(text in p for text in group.no_decay)}
        return Rule(f"group{index}_{kind}", group, tuple(paths), transform, frozenset(decayed))

    def describe(self, params: Tree) -> list[str]:
        """One line for each rule: name, parameters, how many are decayed; and what matches nothing."""
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
        # Not an error: a part may be switched off. But a misspelt word must not go unseen.
        words = {word for group in self.config.groups for word in group.match}
        lost = sorted(word for word in words if not any(word in path for path in flat))
        return [*lines, *(f"nothing is called {word!r} (optim.groups)" for word in lost)]

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
