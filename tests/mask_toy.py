"""Masks to try attention with."""

import jax.numpy as jnp
import numpy as np

from umm_jax.models.masks import MaskSpec


def random_spec(seed: int, tokens: int, rows: int = 2) -> MaskSpec:
    """Packed samples of texts and images, with padding behind them."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(rows):
        columns, sample, split, order = [], 1, 0, 0
        while len(columns) < tokens - 12:
            mode, count = int(rng.integers(0, 3)), int(rng.integers(2, 20))
            columns += [(sample, split, mode, order + i) for i in range(count)]
            split, order = split + 1, order + count
            if rng.random() < 0.2:
                sample, split, order = sample + 1, 0, 0
        columns = columns[: tokens - 12]
        found.append(columns + [(0, 0, 0, 0)] * (tokens - len(columns)))
    return MaskSpec(*jnp.asarray(np.array(found).transpose(2, 0, 1), jnp.int32))
