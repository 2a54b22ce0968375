"""Options for XLA: that they are known to the installed version, and change speed and not results."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umm_jax import compiler


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


@pytest.mark.parametrize("options", [compiler.often, compiler.once])
def test_results_are_those_without_options(options):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.standard_normal(s, np.float32)) for s in ((2, 16, 16, 8), (3, 3, 8, 8)))
    plain, tuned = jax.jit(convolve), jax.jit(convolve, compiler_options=options(jax.devices("cpu")))
    np.testing.assert_allclose(tuned(x, kernel), plain(x, kernel), atol=1e-4)


def test_an_option_that_this_version_does_not_have_is_left_out(monkeypatch):
    compiler._known.cache_clear()
    monkeypatch.setattr(compiler, "_LIBRARY", {"xla_cpu_no_such_option": "1"})
    try:
        assert compiler.often(jax.devices("cpu")) is None
    finally:
        compiler._known.cache_clear()


def test_convolutions_alone_leave_the_library():
    def both(x, kernel):
        y = convolve(x, kernel)
        return y, jnp.sum(y, axis=(0, 1, 2)), kernel[0, 0] @ kernel[0, 0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((6, 64, 64, 64), (3, 3, 64, 64))]
    options = compiler.often(jax.devices("cpu"))
    if options is None:
        pytest.skip("this version of XLA has no such list")
    program = jax.jit(both, compiler_options=options).lower(*shapes).compile().as_text()
    assert re.search(r" convolution\(", program) and not re.search(
        r"ynn_fusion\S* = f32\[6,64,64,64\]", program
    )
    assert re.search(r"ynn_fusion\S* = f32\[64\]", program)
