"""The synchronizer: its laws, and the reference's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import backbone_sync_params, decoder_sync_params, filled, fixture, load, small

from umm_jax.errors import ConfigError
from umm_jax.models.synchronizer import (
    BackboneSync,
    DecoderSync,
    Synchronizer,
    SynchronizerConfig,
    relative_index,
    softmax_plus_one,
)

TINY = SynchronizerConfig(
    d_query=12, d_maps=8, d_values=8, d_out=12, heads=2, points=3, sides=(4, 2), base=4, max_images=5
)


@nnx.jit
def _run(sync, x, maps, visible):
    return sync(x, sync.project(maps), visible)


def _maps(n, b=2, seed=0, sides=(4, 2), width=8):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(b, n, s, s, width)), jnp.float32) for s in sides]


def _query(q=6, b=2, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(b, q, 12)), jnp.float32)


def test_relative_index():
    visible = jnp.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], bool)
    np.testing.assert_array_equal(relative_index(visible), [[3, 2, 0, 1], [0, 0, 0, 0], [0, 2, 1, 0]])


def test_softmax_plus_one_sums_to_one_and_survives_large_logits():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 2, 2, 4)) * 100, jnp.float32)
    visible = jnp.array([[[1, 0, 1], [0, 0, 0]]], bool)[..., None, None, None]
    weights, ignored = softmax_plus_one(logits, visible)
    np.testing.assert_allclose(weights.sum((2, 4, 5)) + ignored, 1, atol=1e-6)
    assert not weights[:, 0, 1].any() and (ignored[:, 1] == 1).all()
    grads = jax.grad(lambda a: softmax_plus_one(a, visible)[0].max())(logits)
    assert np.isfinite(grads).all()


def test_an_image_that_is_not_visible_cannot_matter():
    sync = filled(lambda: Synchronizer(TINY, rngs=nnx.Rngs(0)))
    query, maps = _query(), _maps(3)
    visible = jnp.array([[[1, 0, 1]] * 6, [[0, 1, 0]] * 6], bool)
    out = _run(sync, query, maps, visible)
    changed = [m.at[0, 1].add(5.0).at[1, 0].add(5.0).at[1, 2].add(5.0) for m in maps]
    np.testing.assert_array_equal(out, _run(sync, query, changed, visible))
    # ... nor can its mere presence: leaving it out gives the same.
    left = _run(sync, query[:1], [m[:1, ::2] for m in maps], visible[:1, :, ::2])
    np.testing.assert_allclose(out[:1], left, atol=1e-6)
    # A visible one does matter, and visibility is per query.
    changed = [m.at[0, 0].add(5.0) for m in maps]
    assert np.abs(_run(sync, query, changed, visible)[0] - out[0]).max() > 1e-3
    first = visible.at[0, 2].set(False)
    moved = np.abs(_run(sync, query, maps, first) - out).max((0, 2))
    assert moved[2] > 1e-4 and np.delete(moved, 2).max() == 0


def test_row_visibility_is_broadcast_to_queries():
    sync = filled(lambda: Synchronizer(TINY, rngs=nnx.Rngs(0)))
    query, maps = _query(), _maps(3)
    visible = jnp.array([[1, 0, 1], [0, 1, 0]], bool)
    every = jnp.broadcast_to(visible[:, None], (2, 6, 3))
    np.testing.assert_allclose(_run(sync, query, maps, visible), _run(sync, query, maps, every), atol=1e-6)


def test_without_images_the_bias_path_remains():
    sync = filled(lambda: Synchronizer(TINY, rngs=nnx.Rngs(0)))
    sync.ignore[...] = jnp.zeros(8)
    sync.out.bias[...] = jnp.arange(12.0)
    out = _run(sync, _query(), _maps(1), jnp.zeros((2, 1), bool))
    np.testing.assert_allclose(out, np.broadcast_to(np.arange(12.0), (2, 6, 12)), atol=1e-6)


def test_too_many_images_and_wrong_maps():
    sync = filled(lambda: Synchronizer(TINY, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match="max_images >= 6"):
        sync(_query(), sync.project(_maps(5)), jnp.ones((2, 5), bool))
    with pytest.raises(ValueError, match="do not have the sides"):
        sync.project(_maps(2, sides=(4, 3)))
    with pytest.raises(ConfigError, match="divide"):
        SynchronizerConfig(d_values=10, heads=4)


def test_the_release_starts_as_identity_and_a_small_model_alive():
    @jax.jit
    def changes(x, maps, visible):
        """How far each wrapper, fresh, moves its input."""
        row, pixels = visible[:, 0], x[:, :4].reshape(2, 2, 2, 12)
        out = []
        for gate in (0.0, 0.3):
            sync = BackboneSync(TINY, rngs=nnx.Rngs(0))
            sync.gate.set_value(sync.gate[...] + gate)
            out.append(jnp.abs(sync(x, sync.project(maps), visible) - x).max())
            sync = DecoderSync(TINY, out_init=gate, rngs=nnx.Rngs(0))
            out.append(jnp.abs(sync(pixels, sync.project(maps), row) - pixels).max())
        return out, sync.gate[...]

    (*closed, backbone, decoder), gate = changes(_query(), _maps(3), jnp.ones((2, 6, 3), bool))
    assert closed == [0, 0] and backbone > 1e-2 and decoder > 1e-2
    np.testing.assert_allclose(gate, 0.3)


def test_every_parameter_learns():
    sync = filled(lambda: BackboneSync(TINY, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(sync)

    def loss(state):
        module = nnx.merge(graphdef, state)
        return jnp.sum(module(_query(), module.project(_maps(3)), jnp.ones((2, 6, 3), bool)) ** 2)

    for path, grad in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        # Every row of the index table but "invisible" is used; what a read of nothing gives is learned too.
        assert np.abs(grad[...]).max() > 0, path


def _backbone(state):
    config = SynchronizerConfig(
        d_query=64, d_maps=32, d_values=32, d_out=64, heads=4, points=4, sides=(8, 4, 2), base=16
    )
    return load(lambda: BackboneSync(config, rngs=nnx.Rngs(0)), state)


def test_reference_in_the_language_model():
    t = small("b1.")
    sync = _backbone(backbone_sync_params(small("b1."), "weights"))
    flat = jnp.asarray(t["vision_hidden_states"])
    levels = jnp.split(flat, [64, 80], axis=2)
    maps = [m.reshape(2, 3, s, s, 32) for m, s in zip(levels, (8, 4, 2))]
    visible = jnp.asarray(t["cross_attention_mask"]) > 0
    x = jnp.asarray(t["hidden_states"])
    np.testing.assert_allclose(_run(sync, x, maps, visible) - x, t["output"], atol=1e-5)
    values = nnx.jit(BackboneSync.project)(sync, maps)
    core = nnx.jit(Synchronizer.__call__)(sync.core, sync.query_norm(x), values, visible)
    np.testing.assert_allclose(core, t["core_output"], atol=1e-5)
    # Cached decoding: the last row of the mask belongs to the new token.
    x = jnp.asarray(t["hidden_states_decode"])
    np.testing.assert_allclose(_run(sync, x, maps, visible[:, -1:]) - x, t["output_decode"], atol=1e-5)


def _decoder(state, prefix, side, width):
    config = SynchronizerConfig(
        d_query=width,
        d_maps=32,
        d_values=32,
        d_out=width,
        heads=4,
        points=4,
        sides=(16, 8, 4, 2),
        units=(64, 32, 16, 8),
        base=side,
        max_images=10,
    )
    return load(
        lambda: DecoderSync(config, position_grid=16, rngs=nnx.Rngs(0)), decoder_sync_params(state, prefix)
    )


def _decoder_maps(t, name):
    return [jnp.asarray(t[f"{name}_{s}"]).transpose(0, 1, 3, 4, 2) for s in (16, 8, 4, 2)]


def _close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, atol=1e-5 * max(1.0, np.abs(wanted).max()))


def test_reference_in_the_image_decoder():
    t, state = fixture("b2_unet_mmfs_net"), fixture("model")
    prefix = "image_decoder.decoder.mmfs_module."
    maps = _decoder_maps(t, "feat")
    blocks = [(f"skip_{i}", f"{prefix}mmfs_down_blocks.{i}") for i in range(12)]
    for name, where in [*blocks, ("mid", f"{prefix}mmfs_mid_block")]:
        x = jnp.asarray(t[f"{name}_in"]).transpose(0, 2, 3, 1)
        sync = _decoder(state, where, x.shape[1], x.shape[-1])
        out = _run(sync, x, maps, jnp.asarray(t["mask"]))
        _close(out.transpose(0, 3, 1, 2), t[f"{name}_out"])

    x = jnp.asarray(t["skip_4_in"]).transpose(0, 2, 3, 1)
    sync = _decoder(state, f"{prefix}mmfs_down_blocks.4", 8, 32)
    out = _run(sync, x, _decoder_maps(t, "feat2"), jnp.asarray(t["mask2"])) - x
    _close(out.transpose(0, 3, 1, 2), t["block4_two_image_out"])
