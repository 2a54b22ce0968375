"""One interface to the schedules: how images are noised for training and drawn from noise.

schedule = make_schedule(ScheduleConfig(kind="flow", prediction="x0", shift=3.0))
x_t, t, target = schedule.noised(x0, key)                           # training, fields of ``Noised``
x0 = schedule.sample(predict, (b, h, w, c), key, steps=8)            # predict(x_t, t) -> prediction
"""

from dataclasses import dataclass
from typing import Literal

import jax

from umm_jax.errors import ConfigError
from umm_jax.models.diffusion import BetaKind, Diffusion
from umm_jax.models.flow import Flow, TimeKind

Schedule = Diffusion | Flow


@dataclass(frozen=True)
class ScheduleConfig:
    """Which schedule; the defaults are the diffusion of Stable Diffusion 2.1 as MM-Interleaved samples it.

    Attributes:
        kind: ``ddpm`` (see ``diffusion.py``) or ``flow`` (see ``flow.py``).
        prediction: ``epsilon``, ``x0`` or ``velocity``; None is epsilon for ddpm and x0 for flow.
        train_steps, beta_kind, beta_start, beta_end, steps_offset: of ddpm.
        shift, sample_shift, times: of flow.
        sample_steps: sampling steps where the caller does not choose.
        guidance: guidance scale where the caller does not choose; 1 is none.
    """

    kind: Literal["ddpm", "flow"] = "ddpm"
    prediction: Literal["epsilon", "x0", "velocity"] | None = None
    train_steps: int = 1000
    beta_kind: BetaKind = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps_offset: int = 1
    shift: float = 1.0
    sample_shift: float | None = None
    times: TimeKind = "uniform"
    sample_steps: int = 30
    guidance: float = 1.0

    def __post_init__(self):
        # Building it once shows a wrong value when the config is read, not when the run draws.
        make_schedule(self).timesteps(self.sample_steps)


def make_schedule(config: ScheduleConfig) -> Schedule:
    """The schedule a config describes.

    Raises:
        ConfigError: a value the schedule cannot have.
    """
    if config.kind == "ddpm":
        return Diffusion(
            config.train_steps,
            config.beta_kind,
            config.beta_start,
            config.beta_end,
            config.prediction or "epsilon",
            config.steps_offset,
        )
    if config.kind == "flow":
        return Flow(config.prediction or "x0", config.shift, config.sample_shift, config.times)
    raise ConfigError(f"schedule {config.kind!r} is unknown; choose ddpm or flow")


def guided(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Classifier-free guidance, u + g (c - u): 1 is none (Ho and Salimans 2022, arXiv 2207.12598)."""
    return unconditional + scale * (conditional - unconditional)
