"""Layers that take a way of their own give what the plain formula gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umm_jax.models.layers import Conv, GroupNorm


@pytest.mark.parametrize(
    "options", [dict(groups=6), dict(kernel=1), dict(groups=6, kernel=1), dict(groups=6, padding=0)]
)
def test_depth_wise_and_1x1_convolutions_are_convolutions(options):
    conv = Conv(6, 6, rngs=nnx.Rngs(0), **options)
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 7, 6))

    def reference(kernel, x):
        y = jax.lax.conv_general_dilated(
            x.reshape(6, 5, 7, 6),
            kernel,
            (1, 1),
            conv.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=options.get("groups", 1),
        )
        return y.reshape(2, 3, *y.shape[1:])

    def ours(kernel, x):
        return nnx.merge(graphdef, nnx.State({"kernel": nnx.Param(kernel), "bias": state["bias"]}))(x)

    graphdef, state = nnx.split(conv)
    kernel = conv.kernel[...]
    expected, pull = jax.vjp(reference, kernel, x)
    found, pull_found = jax.vjp(ours, kernel, x)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(pull_found(jnp.cos(expected)), pull(jnp.cos(expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm_normalises_each_group_over_space(groups):
    norm = GroupNorm(6, groups, eps=1e-5, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 7.0), jnp.arange(6.0)
    x = 3 + jax.random.normal(jax.random.key(0), (2, 4, 5, 6)) * jnp.arange(1, 7)
    y = np.asarray(x, np.float64).reshape(2, 20, groups, -1)
    y = (y - y.mean((1, 3), keepdims=True)) / np.sqrt(y.var((1, 3), keepdims=True) + 1e-5)
    expected = y.reshape(2, 4, 5, 6) * np.arange(1, 7) + np.arange(6)
    np.testing.assert_allclose(norm(x), expected, atol=2e-5)
