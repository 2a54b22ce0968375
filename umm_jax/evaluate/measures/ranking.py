"""How well scores rank candidates: against one right one, or against graded relevance.

Source: the metrics of the Visual Dialog challenge (Das et al. 2017), sparse and dense.
"""

import math
from collections.abc import Sequence


def order(scores: Sequence[float]) -> list[int]:
    """Candidates, best first; of equal scores the earlier stands first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def rank(scores: Sequence[float], right: int) -> int:
    """The place of the right candidate, from 1 on."""
    return order(scores).index(right) + 1


def ndcg(scores: Sequence[float], relevance: Sequence[float]) -> float | None:
    """DCG over the first k places by what it could be at best; k candidates are relevant at all.

    DCG = sum over places r = 1..k of relevance / log2(r + 1). None where nothing is relevant.
    """
    k = sum(r != 0 for r in relevance)
    if not k:
        return None
    gained = [relevance[i] for i in order(scores)[:k]]
    return _dcg(gained) / _dcg(sorted(relevance, reverse=True)[:k])


def _dcg(relevance: Sequence[float]) -> float:
    return sum(r / math.log2(place + 2) for place, r in enumerate(relevance))
