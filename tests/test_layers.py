"""Layers that take a way of their own give what the plain formula gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umm_jax.models.layers import Conv, GroupNorm, LayerNorm, RMSNorm, activation, lean


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


@pytest.mark.parametrize(
    ("make", "width"),
    [
        (lambda: RMSNorm(64, rngs=nnx.Rngs(0)), 64),
        (lambda: LayerNorm(64, rngs=nnx.Rngs(0)), 64),
        (lambda: GroupNorm(64, 8, rngs=nnx.Rngs(0)), 64),
        *((lambda name=name: activation(name), 64) for name in ("silu", "gelu", "gelu_tanh", "quick_gelu")),
    ],
)
def test_norms_and_activations_keep_their_argument_and_nothing_else_of_its_size(make, width):
    layer, x = make(), jnp.ones((2, 16, 16, width))
    pull = jax.eval_shape(lambda x: jax.vjp(layer, x)[1], x)
    assert sum(leaf.size >= x.size for leaf in jax.tree.leaves(pull)) == 1


def test_a_product_at_the_end_of_a_lean_function_is_not_computed_again():
    kernel = jnp.ones((8, 8))
    step = jax.grad(lambda x: jnp.sum(lean(lambda x: jnp.tanh(x) @ kernel)(x) ** 2))
    # Once forwards, and once for the gradient of its argument.
    assert str(jax.make_jaxpr(step)(jnp.ones((4, 8)))).count("dot_general") == 2
