"""The compiled training step: gradients (accumulated over microbatches), clip, update, average.

The loss of a step is that of its whole batch, however it is cut:

    loss = sum_k coef[k] * (sum over rows of numerator k) / max(sum over rows of weight k, 1e-6)

so the weights, which depend on the data only, are summed over the whole batch first, and microbatches add up
numerators. Parameters, gradients and optimizer state are float32; with train.dtype="bfloat16" the
parameters are cast for the forward and backward pass only, and what the model returns is summed in float32.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from umm_jax import compiler, sharding
from umm_jax.config import RunConfig, suggest
from umm_jax.data.packing import ADDED
from umm_jax.errors import ConfigError
from umm_jax.families.contract import AutoencoderModel
from umm_jax.stream import StreamSpec
from umm_jax.train.optimizer import Tree
from umm_jax.train.state import Plan, TrainState

Metrics = dict[str, dict[str, Any]]


def make_step(plan: Plan, run: RunConfig) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """``state, metrics = step(state, batch)``, jitted with the plan's shardings; the old state is given up.

    Metrics are device scalars in three sections, to be read some steps later:
        "scalars"  loss, grad_norm, lr
        "sums"     {name: (sum, weight)}: the parts of the loss ("loss/text") and what the model adds
        "counts"   tokens, images, and what other axes the batch has: real ones, without padding
    With train.anomaly="skip" the step takes a third argument, the largest loss that it may have: above it, or
    where loss or gradient norm are not finite, the state stays as it was but for its step, and "counts" has
    "skipped" 1.

    Randomness of step s comes from fold_in(seed, s), so that a resumed run draws what it would have drawn.

    Raises:
        ConfigError: train.accumulate does not divide the batch, or train.loss does not name the parts.
    """
    train, optimizer, mesh = run.train, plan.optimizer, plan.mesh
    rows, ways = run.data.batch_size, sharding.batch_ways(mesh)
    if rows % (train.accumulate * ways):
        near = max(rows // (train.accumulate * ways), 1) * train.accumulate * ways
        raise ConfigError(
            f"data.batch_size={rows} does not divide into train.accumulate={train.accumulate} microbatches "
            f"over data x fsdp = {ways} devices; {near} would"
        )
    differentiate = jax.value_and_grad(_objective(plan, run), has_aux=True)

    skips = train.anomaly == "skip"

    def step(state: TrainState, batch: Any, limit: jax.Array | None = None) -> tuple[TrainState, Metrics]:
        with sharding.use(mesh):
            key = jax.random.fold_in(jax.random.key(train.seed), state["step"])
            trainable, frozen = optimizer.split(state["params"])
            weights = _weights(plan, run, state["params"], batch)
            if train.accumulate == 1:
                (loss, sums), grads = differentiate(trainable, frozen, batch, weights, key)
            else:
                loss, sums, grads = _accumulate(
                    differentiate, trainable, frozen, batch, weights, key, train.accumulate
                )
            homes = optimizer.split(plan.shardings["params"])[0]
            grads = jax.lax.with_sharding_constraint(grads, homes)
            with jax.named_scope("optimizer"):
                trainable, opt, scalars = optimizer.apply(grads, state["opt"], trainable, state["step"])
            new = {
                "step": state["step"] + 1,
                "params": optimizer.merge(trainable, frozen),
                "opt": opt,
                "ema": _average(state["ema"], trainable, train.ema),
            }
            counts = {axis: jnp.sum(features["segment_ids"] > 0) for axis, features in batch.items()}
            if skips:
                good = jnp.isfinite(loss) & jnp.isfinite(scalars["grad_norm"]) & (loss <= limit)
                kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
                new = kept | {"step": new["step"]}
                counts["skipped"] = 1 - good.astype(jnp.int32)
            return new, {"scalars": {"loss": loss, **scalars}, "sums": sums, "counts": counts}

    return jax.jit(
        step,
        in_shardings=(plan.shardings, sharding.batch_sharding(mesh), *(sharding.replicated(mesh),) * skips),
        out_shardings=(plan.shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler.often(mesh.devices.flat),
    )


def abstract_batch(run: RunConfig, spec: StreamSpec, mesh) -> Any:
    """A batch of `run` as ShapeDtypeStructs that carry their sharding: what :func:`make_step` lowers on."""
    home = sharding.batch_sharding(mesh)

    def leaf(axis, shape, dtype):
        whole = (run.data.batch_size, run.data.budget[axis], *shape)
        return jax.ShapeDtypeStruct(whole, np.dtype(dtype), sharding=home)

    return {
        axis: {name: leaf(axis, f.shape, f.dtype) for name, f in features.items()}
        | {name: leaf(axis, (), "int32") for name in ADDED}
        for axis, features in spec.axes.items()
    }


def _model(plan: Plan, params: Tree, dtype) -> AutoencoderModel:
    cast = jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)
    return nnx.merge(plan.graphdef, nnx.State(cast))


def _weights(plan: Plan, run: RunConfig, params: Tree, batch: Any) -> dict[str, jax.Array]:
    """Denominators of the loss parts over the whole batch."""
    model = _model(plan, params, jnp.float32)
    if run.train.objective == "autoencoder":
        return {part: jnp.asarray(w, jnp.float32) for part, w in model.autoencoder_weights(batch).items()}
    weights = model.loss_weights(batch)
    if set(weights) != set(run.train.loss):
        odd = sorted(set(weights) ^ set(run.train.loss))[0]
        raise ConfigError(
            f"train.loss has coefficients for {sorted(run.train.loss)}, the model has the parts "
            f"{sorted(weights)}{suggest(odd, list(weights)) if odd not in weights else ''}"
        )
    return {part: jax.lax.stop_gradient(jnp.asarray(w, jnp.float32)) for part, w in weights.items()}


def _objective(plan: Plan, run: RunConfig) -> Callable:
    """f(trainable, frozen, rows, weights, key) -> (loss, {name: (sum, weight)}), additive over rows."""
    parts, alone = run.train.accumulate, run.train.objective == "autoencoder"
    dtype = jnp.dtype(run.train.dtype)

    def objective(trainable, frozen, rows, weights, key):
        model = _model(plan, plan.optimizer.merge(trainable, frozen), dtype)
        sums, extra = (model.autoencoder_sums if alone else model.loss_sums)(rows, key)
        sums = {part: jnp.asarray(value, jnp.float32) for part, value in sums.items()}
        means = {part: sums[part] / jnp.maximum(weights[part], 1e-6) for part in weights}
        loss = sum(value * (1.0 if alone else run.train.loss[part]) for part, value in means.items())
        # Each microbatch reports its share of the weights, so that the shares add up to the whole.
        metrics = {f"loss/{part}": (sums[part], weights[part] / parts) for part in weights}
        return loss, {**metrics, **_float32(extra)}

    return objective


def _accumulate(differentiate, trainable, frozen, batch, weights, key, parts: int):
    """Loss, metrics and gradients summed over `parts` microbatches, one after another."""

    def cut(x):
        # Row r goes to microbatch r % parts: each device cuts its own rows and none of them move.
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def one(rows, index):
        rows = jax.tree.map(sharding.by_rows, rows)
        (loss, sums), grads = differentiate(trainable, frozen, rows, weights, jax.random.fold_in(key, index))
        return loss, sums, grads

    inputs = (jax.tree.map(cut, batch), jnp.arange(parts))
    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(total, inputs):
        return jax.tree.map(jnp.add, total, one(*inputs)), None

    return jax.lax.scan(body, zeros, inputs)[0]


def _average(ema: Tree, trainable: Tree, decay: float | None) -> Tree:
    if decay is None:
        return ema
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, trainable)


def _float32(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {
        name: (jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32))
        for name, (total, weight) in metrics.items()
    }
