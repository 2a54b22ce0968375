"""Options for XLA: that they are known to the installed version, and change speed and not results."""

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
    monkeypatch.setattr(compiler, "_CONVOLUTIONS", {"xla_cpu_no_such_option": "1"})
    try:
        assert compiler.often(jax.devices("cpu")) is None
    finally:
        compiler._known.cache_clear()
