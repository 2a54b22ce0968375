"""Resizing of maps as two small matrix products, one per axis.

``jax.image.resize`` antialiases when it shrinks and uses the cubic a = -0.5; the reference networks do
neither. These matrices reproduce the usual ``interpolate(..., align_corners=False)``: output pixel i reads
around source position (i + 0.5) * source / target - 0.5, and taps beyond the border read the border pixel.
The matrices are numpy constants, so a resize costs two matmuls and shards like any other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# The cubic of the reference implementations (Keys 1981 with a = -3/4).
CUBIC_A = -0.75


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' piecewise cubic at |distance|, zero from 2 on."""
    d, a = np.abs(distance), CUBIC_A
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(distance))


_KERNELS = {"bilinear": (_linear, 1), "bicubic": (_cubic, 2)}


@functools.lru_cache(maxsize=256)
def resize_matrix(source: int, target: int, method: str = "bilinear") -> np.ndarray:
    """Weights [target, source] (float64) that resize one axis; every row sums to 1.

    Halving with ``bilinear`` is the mean of neighbouring pairs, as no antialiasing is done.

    Raises:
        ValueError: an unknown method or a side below 1.
    """
    if method not in _KERNELS:
        raise ValueError(f"resize method {method!r} is unknown; choose one of {', '.join(_KERNELS)}")
    if source < 1 or target < 1:
        raise ValueError(f"cannot resize a side of {source} to {target}")
    kernel, reach = _KERNELS[method]
    position = (np.arange(target) + 0.5) * (source / target) - 0.5
    low = np.floor(position).astype(int)
    matrix = np.zeros((target, source))
    for tap in range(1 - reach, reach + 1):
        index = low + tap
        np.add.at(matrix, (np.arange(target), np.clip(index, 0, source - 1)), kernel(position - index))
    matrix.setflags(write=False)  # it is shared through the cache
    return matrix


def resize(x: jax.Array, size: tuple[int, int], method: str = "bilinear") -> jax.Array:
    """[..., h, w, C] -> [..., size[0], size[1], C] in the dtype of `x`; `method` bilinear or bicubic."""
    h, w = x.shape[-3:-1]
    if h != size[0]:
        x = jnp.einsum("ih,...hwc->...iwc", resize_matrix(h, size[0], method).astype(x.dtype), x)
    if w != size[1]:
        x = jnp.einsum("jw,...hwc->...hjc", resize_matrix(w, size[1], method).astype(x.dtype), x)
    return x
