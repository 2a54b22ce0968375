"""The denoising diffusion schedule (DDPM): noising, targets and the ancestral sampler.

Time is a step t in 0..T-1; x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, with a_t the product of
1 - beta up to t.
Source: Ho et al. 2020 (arXiv 2006.11239); the settings and the sampling grid of the released MM-Interleaved
are in ``docs/mm_interleaved.md`` sections 5 and 9.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from umm_jax.errors import ConfigError

BetaKind = Literal["linear", "scaled_linear", "cosine"]
DiffusionTarget = Literal["epsilon", "x0", "velocity"]
Predict = Callable[[jax.Array, jax.Array], jax.Array]


class Noised(NamedTuple):
    """A training example of a denoiser.

    Attributes:
        x_t: noisy input, the shape of x0.
        t: time of each image as the model gets it, [B]: steps (int32) of a diffusion, in [0, 1] of a flow.
        target: what the model should predict, float32, the shape of x0.
    """

    x_t: jax.Array
    t: jax.Array
    target: jax.Array


def betas(kind: BetaKind, steps: int, start: float, end: float) -> np.ndarray:
    """Variance added by each step, float64 [steps].

    ``linear`` from `start` to `end`; ``scaled_linear`` linear in the square root (Stable Diffusion);
    ``cosine`` ignores both ends (Nichol and Dhariwal 2021, arXiv 2102.09672).
    """
    if kind == "linear":
        return np.linspace(start, end, steps)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if kind == "cosine":
        at = np.arange(steps + 1) / steps
        keep = np.cos((at + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - keep[1:] / keep[:-1], 0.999)
    raise ConfigError(f"beta schedule {kind!r} is unknown; choose one of linear, scaled_linear, cosine")


def per_image(values: jax.Array, like: jax.Array) -> jax.Array:
    """[B] -> [B, 1, ..., 1] with the rank of `like`."""
    return values.reshape(values.shape[0], *[1] * (like.ndim - 1))


def draw_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [B, ...], from one key or from one key per image [B].

    With its own key an image does not depend on the batch it is in.
    """
    if _is_batch(key):
        return jax.vmap(lambda k: jax.random.normal(k, shape[1:]))(key)
    return jax.random.normal(key, shape)


def split_key(key: jax.Array, count: int) -> jax.Array:
    """[count] keys from one key, [count, B] from one key per image."""
    if _is_batch(key):
        return jnp.swapaxes(jax.vmap(lambda k: jax.random.split(k, count))(key), 0, 1)
    return jax.random.split(key, count)


def _is_batch(key: jax.Array) -> bool:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim > (0 if typed else 1)


class Diffusion:
    """A DDPM schedule of `steps` training steps whose model predicts `prediction`.

    Args:
        steps: training steps T.
        kind, start, end: see :func:`betas`.
        prediction: ``epsilon`` the noise, ``x0`` the clean image, ``velocity`` sqrt(a) eps - sqrt(1 - a) x0.
        steps_offset: added to every sampling step.
    """

    def __init__(
        self,
        steps: int = 1000,
        kind: BetaKind = "scaled_linear",
        start: float = 0.00085,
        end: float = 0.012,
        prediction: DiffusionTarget = "epsilon",
        steps_offset: int = 1,
    ):
        if prediction not in ("epsilon", "x0", "velocity"):
            raise ConfigError(f"a diffusion predicts epsilon, x0 or velocity, not {prediction!r}")
        self.steps, self.prediction, self.steps_offset = steps, prediction, steps_offset
        self.alphas = np.cumprod(1.0 - betas(kind, steps, start, end))  # a_t, [steps]

    def draw_times(self, key: jax.Array, count: int) -> jax.Array:
        """Training steps [count], uniform, int32."""
        return jax.random.randint(key, (count,), 0, self.steps)

    def noised(self, x0: jax.Array, key: jax.Array) -> Noised:
        """Noise and a uniform step for each image of x0 [B, ...]."""
        key_t, key_noise = jax.random.split(key)
        return self.at(x0, jax.random.normal(key_noise, x0.shape), self.draw_times(key_t, x0.shape[0]))

    def at(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> Noised:
        """The example with the given `noise` (shape of x0) and steps `t` [B]; computed in float32."""
        x0 = x0.astype(jnp.float32)
        alpha = per_image(jnp.asarray(self.alphas, jnp.float32)[t], x0)
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        target = {"epsilon": noise, "x0": x0, "velocity": signal * noise - sigma * x0}[self.prediction]
        return Noised(signal * x0 + sigma * noise, t, target)

    def timesteps(self, steps: int) -> np.ndarray:
        """Sampling steps, noisiest first: k (T // steps) + offset ("leading" spacing), int32 [steps]."""
        if not 1 <= steps <= self.steps:
            raise ConfigError(f"sampling steps must be between 1 and {self.steps}, got {steps}")
        grid = np.arange(steps)[::-1] * (self.steps // steps) + self.steps_offset
        if grid[0] >= self.steps:
            raise ConfigError(
                f"{steps} sampling steps reach step {grid[0]} of {self.steps}: choose fewer sampling steps "
                f"or steps_offset=0"
            )
        return grid.astype(np.int32)

    def coefficients(self, steps: int) -> dict[str, np.ndarray]:
        """Per sampling step, float32 [steps]: the clean image from x_t and the prediction, and the posterior.

        x0 = ``clean_x`` x_t + ``clean_p`` prediction;  x_{t-1} = ``x0`` x0 + ``x_t`` x_t + ``noise`` N(0, 1).
        The posterior variance is the "small" one of Ho et al.; clean images are not clipped.
        """
        grid = self.timesteps(steps)
        before = grid - self.steps // steps
        a = self.alphas[grid]
        a_before = np.where(before >= 0, self.alphas[before], 1.0)
        a_step = a / a_before
        clean = {
            "epsilon": (1 / np.sqrt(a), -np.sqrt((1 - a) / a)),
            "x0": (np.zeros_like(a), np.ones_like(a)),
            "velocity": (np.sqrt(a), -np.sqrt(1 - a)),
        }[self.prediction]
        table = {
            "clean_x": clean[0],
            "clean_p": clean[1],
            "x0": np.sqrt(a_before) * (1 - a_step) / (1 - a),
            "x_t": np.sqrt(a_step) * (1 - a_before) / (1 - a),
            "noise": np.sqrt((1 - a_before) / (1 - a) * (1 - a_step)),
        }
        return {name: values.astype(np.float32) for name, values in table.items()}

    def sample(
        self,
        predict: Predict,
        shape: tuple[int, ...],
        key: jax.Array,
        steps: int,
        *,
        initial: jax.Array | None = None,
        noise: jax.Array | None = None,
    ) -> jax.Array:
        """Ancestral sampling from noise to a clean image.

        Args:
            predict: (x_t [B, ...], t [B] int32) -> prediction of the kind of this schedule.
            shape: [B, ...] of the images.
            key: one key, or one per image [B] so that each image depends on its own key alone.
            steps: sampling steps, static.
            initial, noise: the starting noise [B, ...] and that of each step [steps, B, ...], when they are
                not to be drawn from `key`.

        Returns:
            x0, float32 of `shape`.
        """
        key_start, key_steps = split_key(key, 2)
        x = draw_normal(key_start, shape) if initial is None else initial.astype(jnp.float32)
        draws = split_key(key_steps, steps) if noise is None else noise

        def step(x, inputs):
            t, c, drawn = inputs
            prediction = predict(x, jnp.full(shape[:1], t)).astype(jnp.float32)
            clean = c["clean_x"] * x + c["clean_p"] * prediction
            fresh = draw_normal(drawn, shape) if noise is None else drawn
            return c["x0"] * clean + c["x_t"] * x + c["noise"] * fresh, None

        tables = (jnp.asarray(self.timesteps(steps)), jax.tree.map(jnp.asarray, self.coefficients(steps)))
        return jax.lax.scan(step, x, (*tables, draws))[0]
