"""What XLA is told beside the program, by the platform the program is for.

``jax.jit(f, compiler_options=...)`` takes what these functions return; None, for most platforms, is nothing.
"""

import functools
from collections.abc import Iterable

import jax

Options = dict[str, str | int] | None

# XLA's CPU backend hands products, reductions and convolutions to YNNPACK. Its convolutions are half as fast
# as XLA's own at the sizes of a UNet, and five times slower for the gradient of a kernel; its reductions are
# two to six times as fast (jaxlib 0.10.2). This is the list of what it is given.
_LIBRARY = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE",
}


def often(devices: Iterable[jax.Device] | None = None) -> Options:
    """For a program that will run many times on `devices` (those of the default backend when None)."""
    return dict(_LIBRARY) if _platform(devices) == "cpu" and _known("cpu") else None


def once(devices: Iterable[jax.Device] | None = None) -> Options:
    """For a program that will run once: on a CPU, optimising it takes longer than it saves."""
    return {"xla_backend_optimization_level": 0} if _platform(devices) == "cpu" else None


def _platform(devices: Iterable[jax.Device] | None) -> str:
    return jax.default_backend() if devices is None else next(iter(devices)).platform


@functools.cache
def _known(platform: str) -> bool:
    """Whether this version of XLA has the options: one that it has not makes every compilation fail."""
    try:
        with jax.default_device(jax.local_devices(backend=platform)[0]):
            jax.jit(lambda x: x, compiler_options=_LIBRARY)(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True
