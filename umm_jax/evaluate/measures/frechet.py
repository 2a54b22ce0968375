"""Distances between two sets of pictures by their features: Fréchet (FID) and kernel (KID).

Features are numbers a network gives for a picture, [D] each; which network, and how pictures are brought to
its size, moves the figures by more than most models differ, so both are named wherever a figure is told (see
``measures.features``). Everything here is float64.

Sources: FID, Heusel et al. 2017; KID, Bińkowski et al. 2018; merging of means and scatters, Chan et al. 1979.
"""

import math

import numpy as np

from umm_jax.errors import DataError

_EPS = np.finfo(np.float64).eps
_ROWS = 2048  # rows of features whose kernels are worked out together


class Moments:
    """Mean and covariance of features that come in batches, without keeping them.

    Attributes:
        n: features so far. mean: float64[D]. scatter: float64[D, D], the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self, what: str = "features"):
        """Args: what: names them in complaints, e.g. "drawn pictures"."""
        self.what = what
        self.n = 0
        self.mean = np.zeros(0)
        self.scatter = np.zeros((0, 0))

    def add(self, features: np.ndarray) -> "Moments":
        """Takes a batch [N, D]; N may be 0.

        Raises:
            DataError: another shape or width than before, or a number that is not finite.
        """
        batch = np.asarray(features, np.float64)
        if batch.ndim != 2:
            raise DataError(f"{self.what}: features must be [N, D], they are {list(batch.shape)}")
        if bad := int((~np.isfinite(batch)).any(1).sum()):
            raise DataError(f"{self.what}: {bad} of {len(batch)} features hold NaN or infinity")
        if not len(batch):
            return self
        mean = batch.mean(0)
        centred = batch - mean
        return self._join(len(batch), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> "Moments":
        """Takes what another has taken, as if its batches had come here. Raises DataError: another width."""
        return self._join(other.n, other.mean, other.scatter) if other.n else self

    def _join(self, n: int, mean: np.ndarray, scatter: np.ndarray) -> "Moments":
        if not self.n:
            self.n, self.mean, self.scatter = n, mean.copy(), scatter.copy()
            return self
        if mean.shape != self.mean.shape:
            raise DataError(f"{self.what}: features of {len(mean)} numbers among ones of {len(self.mean)}")
        total = self.n + n
        step = mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(step, step) * (self.n * n / total)
        self.mean = self.mean + step * (n / total)
        self.n = total
        return self

    @property
    def covariance(self) -> np.ndarray:
        """float64[D, D], with N - 1. Raises DataError where fewer than two features came."""
        if self.n < 2:
            raise DataError(f"{self.what}: a covariance needs two pictures or more, there are {self.n}")
        return self.scatter / (self.n - 1)


def frechet(a: Moments, b: Moments) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), 0 or more.

    The trace of the root is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2): that matrix is
    symmetric, so unlike the root of S1 S2 it has no imaginary part, and it needs no small number added to
    the diagonals where there are fewer pictures than D. Eigenvalues within rounding of 0 are taken as 0.

    With few pictures the value is too high, the more the fewer (all of S is estimated): compare only figures
    of the same number of pictures.

    Raises:
        DataError: fewer than two pictures in one of them, or features of different widths.
    """
    first, second = a.covariance, b.covariance
    if first.shape != second.shape:
        raise DataError(
            f"{a.what} have features of {len(first)} numbers, {b.what} of {len(second)}: another network"
        )
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(_positive(values))) @ vectors.T
    # Rounding leaves it not quite symmetric.
    product = root @ second @ root
    shared = _positive(np.linalg.eigvalsh((product + product.T) / 2))
    step = a.mean - b.mean
    found = step @ step + np.trace(first) + np.trace(second) - 2 * np.sqrt(shared).sum()
    return max(float(found), 0.0)


def _positive(values: np.ndarray) -> np.ndarray:
    """Eigenvalues of a matrix that has none below 0, without what rounding left."""
    least = max(values.max(initial=0.0), 0.0) * len(values) * _EPS
    return np.where(values > least, values, 0.0)


def kernel(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased squared MMD with the kernel (x . y / D + 1)^3; may lie below 0.

    Of all pairs; the packages take means over random subsets, which is another estimate of the same number.

    Args:
        a, b: features [N, D] and [M, D].

    Raises:
        DataError: fewer than two rows, another width, or a number that is not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    for side in (a, b):
        if side.ndim != 2 or len(side) < 2 or side.shape[1] != b.shape[-1]:
            raise DataError(
                f"a kernel distance needs [N, D] and [M, D] with two rows or more, got {list(a.shape)} and "
                f"{list(b.shape)}"
            )
        if not np.isfinite(side).all():
            raise DataError("features hold NaN or infinity")
    within = [_kernels(side, side) - math.fsum(_own(side)) for side in (a, b)]
    n, m = len(a), len(b)
    return within[0] / (n * (n - 1)) + within[1] / (m * (m - 1)) - 2 * _kernels(a, b) / (n * m)


def _own(x: np.ndarray) -> np.ndarray:
    return ((x * x).sum(1) / x.shape[1] + 1) ** 3


def _kernels(x: np.ndarray, y: np.ndarray) -> float:
    """The sum of kernels of all pairs."""
    blocks = (x[at : at + _ROWS] for at in range(0, len(x), _ROWS))
    return math.fsum(float(((block @ y.T / x.shape[1] + 1) ** 3).sum()) for block in blocks)
