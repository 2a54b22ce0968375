"""The deformable aggregation: every implementation against a plain loop, the reference and the gather."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import small

from umm_jax.errors import ConfigError
from umm_jax.models import deformable, deformable_rows
from umm_jax.models.deformable import choose, sample

SIDES = ((4, 6), 3, 1)
ALL = ("rows", "gather", "hat", "pallas")


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


@pytest.mark.parametrize("implementation", ALL)
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
@pytest.mark.parametrize("implementation", [i for i in ALL if i != "gather"])
def test_implementations_agree_in_value_and_gradients(implementation, on_centres):
    values, locations, weights = map(jnp.asarray, _inputs(seed=1))
    if on_centres:  # where the slope of bilinear interpolation jumps: both must take the same side
        locations = (jnp.round(locations * 2) + 0.5) / jnp.array([6.0, 4.0])
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 3, 2)), jnp.float32)
    first = _value_and_grads("gather", (values, locations, weights), SIDES, cotangent)
    second = _value_and_grads(implementation, (values, locations, weights), SIDES, cotangent)
    for a, b in zip(first, second):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("implementation", ALL)
def test_edges_of_the_map_and_points_far_away(implementation):
    # Pixel centres around the border of a map 4 wide, the places where a corner enters or leaves it, and
    # far outside: value and slope in x of a map that is 1 everywhere.
    x = jnp.array([-1e9, -2.0, -1.0, -0.5, 0.0, 1.5, 3.0, 3.5, 4.0, 5.0, 1e9])
    locations = jnp.stack([(x + 0.5) / 4, jnp.full_like(x, 0.5)], -1).reshape(1, -1, 1, 1, 1, 1, 2)
    out, _, slopes, _ = _value_and_grads(
        implementation,
        (jnp.ones((1, 1, 12, 1, 1)), locations, jnp.ones((1, x.size, 1, 1, 1, 1))),
        ((3, 4),),
        jnp.ones((1, x.size, 1, 1)),
    )
    np.testing.assert_allclose(out.ravel(), [0, 0, 0, 0.5, 1, 1, 1, 0.5, 0, 0, 0], atol=1e-6)
    expected = [0, 0, 4, 4, 0, 0, -4, -4, 0, 0, 0]
    np.testing.assert_allclose(slopes[..., 0].ravel(), expected, atol=1e-6)


def test_hat_in_turns_is_the_same(monkeypatch):
    inputs = tuple(map(jnp.asarray, _inputs(q=7, seed=3)))
    cotangent = jnp.ones((2, 7, 3, 2))
    whole = _value_and_grads("hat", inputs, SIDES, cotangent)
    # Three queries at a time: the last turn is padded.
    monkeypatch.setattr(deformable, "HAT_BUDGET", 2 * 3 * 3 * 2 * inputs[0].shape[2])
    monkeypatch.setattr(deformable, "LANES", 1)
    for a, b in zip(whole, _value_and_grads("hat", inputs, SIDES, cotangent)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_in_turns_are_the_same(monkeypatch):
    inputs = tuple(map(jnp.asarray, _inputs(q=7, seed=3)))
    cotangent = jnp.ones((2, 7, 3, 2))
    whole = _value_and_grads("rows", inputs, SIDES, cotangent)
    # Three queries of both rows at a time (3 levels, 4 points, 4 corners, width 2): the last turn is padded.
    monkeypatch.setattr(deformable_rows, "CHUNK", 3 * 2 * 3 * 4 * 4 * 2)
    for a, b in zip(whole, _value_and_grads("rows", inputs, SIDES, cotangent)):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_in_bfloat16_add_in_float32():
    values, locations, weights = map(jnp.asarray, _inputs(seed=4))
    values = values.astype(jnp.bfloat16)
    run = jax.jit(lambda *a: sample(*a, SIDES, implementation="rows"))
    out, exact = run(values, locations, weights), run(values.astype(jnp.float32), locations, weights)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def _program(platform, queries=256):
    """What the gradient of `sample` lowers to for a platform, which need not be here."""
    values, locations, weights = map(jnp.asarray, _inputs(q=queries))
    grad = jax.jit(jax.grad(lambda *a: jnp.sum(sample(*a, SIDES)), argnums=(0, 1, 2)))
    return grad.trace(values, locations, weights).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_of_the_program_decides():
    # hat is the one without a gather, rows the one with loops. Nothing of another platform's is left.
    tpu, cpu, gpu = map(_program, ("tpu", "cpu", "cuda"))
    assert "stablehlo.gather" not in tpu and "stablehlo.dot_general" in tpu
    assert "stablehlo.gather" in cpu and "stablehlo.while" in cpu
    assert "stablehlo.gather" in gpu and "stablehlo.while" not in gpu


def test_default_under_scan_remat_and_vmap():
    values, locations, weights = map(jnp.asarray, _inputs(seed=5, b=3))

    def one(scale, values, locations, weights):
        @jax.checkpoint
        def layer(carry, _):
            return carry + jnp.sum(sample(values * carry, locations, weights, SIDES) ** 2), None

        return jax.lax.scan(layer, scale, None, length=2)[0]

    def by_hand(scale, values, locations, weights):
        for _ in range(2):
            out = sample(values * scale, locations, weights, SIDES, implementation="gather")
            scale = scale + jnp.sum(out**2)
        return scale

    args = (jnp.float32(0.01), values[:, None], locations[:, None], weights[:, None])
    axes = (None, 0, 0, 0)
    argnums = (1, 2, 3)
    got = jax.jit(jax.vmap(jax.grad(one, argnums), axes))(*args)
    expected = jax.jit(jax.vmap(jax.grad(by_hand, argnums), axes))(*args)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("implementation", ALL)
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
    assert [choose(p, 1344, 10**6) for p in ("cpu", "gpu", "tpu")] == ["rows", "gather", "hat"]
    assert choose("cpu", 1344, 96) == "gather"
    inputs = tuple(map(jnp.asarray, _inputs()))
    with pytest.raises(ValueError, match="34 cells in 3 levels; values have"):
        sample(inputs[0][:, :, 1:], *inputs[1:], SIDES)
    with pytest.raises(ConfigError, match="'slow' is unknown; choose one of auto, rows, gather, hat, pallas"):
        sample(*inputs, SIDES, implementation="slow")
