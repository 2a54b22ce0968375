"""Rectified flow: straight paths from images to noise, x_t = (1 - t) x_0 + t eps with t in [0, 1].

Source: Liu et al. 2022 (arXiv 2209.03003); the time shift as in Esser et al. 2024 (arXiv 2403.03206). What
``configs/world_tiny.py`` learns with, ``x0`` prediction and shift 3, is our choice for small pictures.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from umm_jax.errors import ConfigError
from umm_jax.models.diffusion import Noised, Predict, draw_normal, per_image

FlowTarget = Literal["x0", "velocity"]
TimeKind = Literal["uniform", "logit_normal"]


def shifted(u, shift: float):
    """Moves times towards noise, keeping 0 and 1: s u / (1 + (s - 1) u). Arrays of numpy or jax."""
    return shift * u / (1 + (shift - 1) * u)


class Flow:
    """A rectified flow whose model predicts `prediction`.

    Args:
        prediction: ``x0`` the clean image, or ``velocity`` dx/dt = eps - x0.
        shift: time shift of training; 1 is none.
        sample_shift: time shift of the sampling grid; that of training unless given.
        times: distribution of u before the shift in training: ``uniform``, or ``logit_normal``, which is
            sigmoid(N(0, 1)).
    """

    def __init__(
        self,
        prediction: FlowTarget = "x0",
        shift: float = 1.0,
        sample_shift: float | None = None,
        times: TimeKind = "uniform",
    ):
        if prediction not in ("x0", "velocity"):
            raise ConfigError(f"a flow predicts x0 or velocity, not {prediction!r}")
        if times not in ("uniform", "logit_normal"):
            raise ConfigError(f"flow times {times!r} are unknown; choose uniform or logit_normal")
        self.sample_shift = shift if sample_shift is None else sample_shift
        if shift <= 0 or self.sample_shift <= 0:
            raise ConfigError(f"time shifts must be positive, got {shift} and {self.sample_shift}")
        self.prediction, self.shift, self.times = prediction, shift, times

    def draw_times(self, key: jax.Array, count: int) -> jax.Array:
        """Training times [count] in [0, 1], float32."""
        if self.times == "uniform":
            u = jax.random.uniform(key, (count,))
        else:
            u = jax.nn.sigmoid(jax.random.normal(key, (count,)))
        return shifted(u, self.shift)

    def noised(self, x0: jax.Array, key: jax.Array) -> Noised:
        """Noise and a time for each image of x0 [B, ...]."""
        key_t, key_noise = jax.random.split(key)
        return self.at(x0, jax.random.normal(key_noise, x0.shape), self.draw_times(key_t, x0.shape[0]))

    def at(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> Noised:
        """The example with the given `noise` (shape of x0) and times `t` [B]; computed in float32."""
        x0 = x0.astype(jnp.float32)
        at = per_image(t, x0)
        target = x0 if self.prediction == "x0" else noise - x0
        return Noised((1 - at) * x0 + at * noise, t, target)

    def timesteps(self, steps: int, shift: float | None = None) -> np.ndarray:
        """Times of the sampling grid from 1 to 0, both included: float32 [steps + 1].

        `shift` takes the place of ``sample_shift``.
        """
        if steps < 1:
            raise ConfigError(f"sampling steps must be at least 1, got {steps}")
        shift = self.sample_shift if shift is None else shift
        return shifted(np.linspace(1.0, 0.0, steps + 1), shift).astype(np.float32)

    def advance(self, x: jax.Array, prediction: jax.Array, t, after) -> jax.Array:
        """One Euler step of x from time `t` to `after`, scalars, by what the model predicts there."""
        velocity = prediction if self.prediction == "velocity" else (x - prediction) / t
        return x + (after - t) * velocity

    def sample(
        self,
        predict: Predict,
        shape: tuple[int, ...],
        key: jax.Array,
        steps: int,
        *,
        initial: jax.Array | None = None,
    ) -> jax.Array:
        """Euler steps along the path from noise to a clean image.

        Args:
            predict: (x_t [B, ...], t [B] float32) -> prediction of the kind of this flow.
            shape: [B, ...] of the images.
            key: one key, or one per image [B] so that each image depends on its own key alone.
            steps: sampling steps (evaluations of `predict`), static.
            initial: the starting noise when it is not to be drawn from `key`.

        Returns:
            x0, float32 of `shape`.
        """
        x = draw_normal(key, shape) if initial is None else initial.astype(jnp.float32)

        def step(x, times):
            t, after = times
            prediction = predict(x, jnp.full(shape[:1], t)).astype(jnp.float32)
            return self.advance(x, prediction, t, after), None

        grid = jnp.asarray(self.timesteps(steps))
        return jax.lax.scan(step, x, (grid[:-1], grid[1:]))[0]
