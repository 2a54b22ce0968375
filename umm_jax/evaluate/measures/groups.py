"""Groups: what belongs together, means of the means of groups, and what each member adds to them.

Where groups are of different sizes, a member of a small one weighs more than one of a large one.
"""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

K, T = TypeVar("K", bound=Hashable), TypeVar("T")


def together(pairs: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    """{key: values} in order of their first coming."""
    found: dict[K, list[T]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found


def mean_of_means(groups: Mapping[str, Sequence[float]], weights: Mapping[str, float] | None = None) -> float:
    """The mean of the groups' means.

    Args:
        groups: none of them empty.
        weights: of each group; without, all weigh the same. They are not normalised.
    """
    means = {name: math.fsum(values) / len(values) for name, values in groups.items()}
    if weights is None:
        return math.fsum(means.values()) / len(means)
    return math.fsum(weights[name] * mean for name, mean in means.items())


def weighted(
    groups: Mapping[str, Mapping[str, float]], weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """{member: value} whose plain mean is :func:`mean_of_means`; members are named across groups."""
    count = sum(map(len, groups.values()))
    return {
        member: value * count / len(values) * (1 / len(groups) if weights is None else weights[name])
        for name, values in groups.items()
        for member, value in values.items()
    }
