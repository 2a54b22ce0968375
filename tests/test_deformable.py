"""The deformable aggregation: both implementations against a plain loop, the reference and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import small

from umm_jax.models import deformable
from umm_jax.models.deformable import choose, sample

SIDES = ((4, 6), 3, 1)


def _inputs(b=2, q=5, n=2, heads=3, points=4, width=2, sides=SIDES, seed=0):
    rng = np.random.default_rng(seed)
    cells = sum(s * s if isinstance(s, int) else s[0] * s[1] for s in sides)
    values = rng.normal(size=(b, n, cells, heads, width)).astype(np.float32)
    locations = rng.uniform(-0.4, 1.4, (b, q, n, heads, len(sides), points, 2)).astype(np.float32)
    weights = rng.normal(size=locations.shape[:-1]).astype(np.float32)
    return values, locations, weights


def _loop(values, locations, weights, sides):
    """The definition, one point at a time."""
    b, q, n, heads, levels, points, _ = locations.shape
    out = np.zeros((b, q, heads, values.shape[-1]))
    start = 0
    for level, (h, w) in enumerate((s, s) if isinstance(s, int) else s for s in sides):
        maps = values[:, :, start : start + h * w].reshape(b, n, h, w, heads, -1)
        start += h * w
        for i in np.ndindex(b, q, n, heads, points):
            row, query, image, head, point = i
            x, y = locations[row, query, image, head, level, point] * (w, h) - 0.5
            for yy in (int(np.floor(y)), int(np.floor(y)) + 1):
                for xx in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= yy < h and 0 <= xx < w:
                        share = (1 - abs(x - xx)) * (1 - abs(y - yy))
                        share *= weights[row, query, image, head, level, point]
                        out[row, query, head] += share * maps[row, image, yy, xx, head]
    return out


@pytest.mark.parametrize("implementation", ["gather", "hat"])
def test_sample_is_the_definition(implementation):
    inputs = _inputs()
    run = jax.jit(lambda *a: sample(*a, SIDES, implementation=implementation))
    out = run(*map(jnp.asarray, inputs))
    np.testing.assert_allclose(out, _loop(*inputs, SIDES), atol=1e-5)


def _value_and_grads(implementation, inputs, sides, cotangent):
    @jax.jit
    def run(inputs, cotangent):
        out, back = jax.vjp(lambda *a: sample(*a, sides, implementation=implementation), *inputs)
        return (out, *back(cotangent))

    return run(inputs, cotangent)


@pytest.mark.parametrize("on_centres", [False, True])
def test_implementations_agree_in_value_and_gradients(on_centres):
    values, locations, weights = map(jnp.asarray, _inputs(seed=1))
    if on_centres:  # where the slope of bilinear interpolation jumps: both must take the same side
        locations = (jnp.round(locations * 2) + 0.5) / jnp.array([6.0, 4.0])
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 3, 2)), jnp.float32)
    first = _value_and_grads("gather", (values, locations, weights), SIDES, cotangent)
    second = _value_and_grads("hat", (values, locations, weights), SIDES, cotangent)
    for a, b in zip(first, second):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_hat_in_turns_is_the_same(monkeypatch):
    inputs = tuple(map(jnp.asarray, _inputs(q=7, seed=3)))
    cotangent = jnp.ones((2, 7, 3, 2))
    whole = _value_and_grads("hat", inputs, SIDES, cotangent)
    # Three queries at a time: the last turn is padded.
    monkeypatch.setattr(deformable, "HAT_BUDGET", 3 * 3 * 2 * inputs[0].shape[2])
    for a, b in zip(whole, _value_and_grads("hat", inputs, SIDES, cotangent)):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", ["gather", "hat"])
def test_reference(implementation):
    t = small("a.")
    sides = [tuple(int(s) for s in row) for row in t["spatial_shapes"]]
    inputs = (
        jnp.asarray(t["value"])[:, None],
        jnp.asarray(t["sampling_locations"])[:, :, None],
        jnp.asarray(t["attention_weights"])[:, :, None],
    )
    cotangent = jnp.asarray(t["grad_output"]).reshape(2, 9, 4, 6)
    out, values, locations, weights = _value_and_grads(implementation, inputs, sides, cotangent)
    np.testing.assert_allclose(out.reshape(2, 9, 24), t["output"], atol=1e-5)
    np.testing.assert_allclose(values[:, 0], t["grad_value"], atol=1e-5)
    np.testing.assert_allclose(locations[:, :, 0], t["grad_sampling_locations"], atol=1e-5)
    np.testing.assert_allclose(weights[:, :, 0], t["grad_attention_weights"], atol=1e-5)


def test_choose_and_errors():
    assert choose(189, "cpu") == "hat" and choose(5440, "cpu") == "gather" and choose(5440, "tpu") == "hat"
    inputs = tuple(map(jnp.asarray, _inputs()))
    with pytest.raises(ValueError, match="34 cells in 3 levels; values have"):
        sample(inputs[0][:, :, 1:], *inputs[1:], SIDES)
    with pytest.raises(ValueError, match="'slow' is unknown"):
        sample(*inputs, SIDES, implementation="slow")
