"""Token choice: greedy, nucleus, and independence of the rows."""

import jax
import jax.numpy as jnp
import numpy as np

from umm_jax.models.decoding import choose_token


def keys(seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def test_temperature_zero_takes_the_most_probable_whatever_the_key():
    logits = jnp.array([[0.0, 3.0, 1.0], [5.0, -1.0, 4.9]])
    for seed in range(5):
        assert choose_token(logits, keys([seed, seed + 1]), 0.0, 1.0).tolist() == [1, 0]


def test_nucleus_keeps_the_smallest_set_that_holds_the_mass():
    # Probabilities .5 .3 .15 .05: a mass of .75 needs the first two.
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    draws = choose_token(jnp.repeat(logits, 4000, 0), keys(range(4000)), 1.0, 0.75)
    counts = np.bincount(draws, minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.625, 0.375, 0, 0], atol=0.03)
    only = choose_token(jnp.repeat(logits, 100, 0), keys(range(100)), 1.0, 1e-6)
    assert set(only.tolist()) == {0}


def test_forbidden_tokens_are_never_drawn():
    logits = jnp.array([[0.0, -jnp.inf, 0.0]])
    draws = choose_token(jnp.repeat(logits, 500, 0), keys(range(500)), 2.0, 1.0)
    assert set(draws.tolist()) == {0, 2}


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jax.random.normal(jax.random.key(0), (4, 50))
    together = choose_token(logits, keys([3, 1, 4, 1]), 1.0, 0.9)
    alone = [choose_token(logits[i : i + 1], keys([s]), 1.0, 0.9)[0] for i, s in enumerate([3, 1, 4, 1])]
    assert together.tolist() == [int(a) for a in alone]
