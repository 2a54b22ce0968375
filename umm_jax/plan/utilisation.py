"""What a step would take at the peak of its devices: the denominator of a run's utilisation."""

import dataclasses
import sys

import jax

from umm_jax.config import MeshConfig, RunConfig
from umm_jax.plan.chips import CHIPS
from umm_jax.plan.counting import model_flops
from umm_jax.plan.hlo import Unreadable
from umm_jax.plan.steps import train_step

# bfloat16 FLOP/s of a device as JAX names its kind. GPUs: dense, as NVIDIA's data sheets say of the SXM form.
PEAKS = {
    "TPU v4": CHIPS["v4"].peak,
    "TPU v5 lite": CHIPS["v5e"].peak,
    "TPU v5": CHIPS["v5p"].peak,
    "TPU v5p": CHIPS["v5p"].peak,
    "TPU v6 lite": CHIPS["v6e"].peak,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def ideal_seconds(run: RunConfig, devices: int) -> float | None:
    """Seconds that the model FLOPs of a whole batch, padding included, take so many devices at their peak.

    None where the peak of the devices here is not known, or the step is not the model's own.
    """
    peak = PEAKS.get(jax.devices()[0].device_kind)
    if peak is None or run.train.objective != "model":
        return None
    one = dataclasses.replace(run, mesh=MeshConfig(1, 1, 1))
    try:
        work = model_flops(train_step(one, jax.devices()[:1]))
    except Unreadable as error:
        print(f"mfu       is not told: {error}", file=sys.stderr)
        return None
    return sum(part.total for part in work.values()) / (peak * devices)
