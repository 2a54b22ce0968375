"""Masks as run lengths, the way COCO writes them: column by column, zeros first; as a list or as a string.

The string packs each length into bytes of five bits and a bit that says whether more follow, from the third
length on as the difference to the length two before. Source: the mask format of the COCO API.
"""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np

from umm_jax.errors import DataError


def decode(mask: Any, where: str) -> np.ndarray:
    """bool[h, w] of {"size": [h, w], "counts": list or string}. Raises DataError."""
    try:
        (height, width), counts = (operator.index(v) for v in mask["size"]), mask["counts"]
        runs = np.array(_unpacked(counts) if isinstance(counts, (str, bytes)) else counts, np.int64)
        whole = runs.ndim == 1 and min(height, width, *runs) >= 0 and sum(map(int, runs)) == height * width
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        whole = False
    if not isinstance(mask, Mapping) or not whole:
        raise DataError(f'{where}: a mask must be {{"size": [h, w], "counts": ...}} whose runs fill it')
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def _unpacked(text: str | bytes) -> list[int]:
    data = text.encode() if isinstance(text, str) else text
    runs: list[int] = []
    at = 0
    while at < len(data):
        value, shift, more = 0, 0, True
        while more:
            byte = data[at] - 48
            if not 0 <= byte < 64:
                raise ValueError("no run length")
            value |= (byte & 31) << shift
            shift, more, at = shift + 5, bool(byte & 32), at + 1
        if byte & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
