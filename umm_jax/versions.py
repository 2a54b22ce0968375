"""Versions of what computes: for reports, checkpoints and ``umm version``."""

import platform
from importlib import metadata

from umm_jax import __version__


def versions() -> dict[str, str]:
    """Of this package, Python and what figures depend on; absent packages are left out."""
    found = {"umm_jax": __version__, "python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
