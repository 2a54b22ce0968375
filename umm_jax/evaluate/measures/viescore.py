"""VIEScore: what a judge says in JSON of an edited picture, and the score made of it.

A judge is asked twice: how well the edit follows the instruction and spares the rest (semantic consistency,
SC), and how natural and free of artefacts the picture is (perceptual quality, PQ). Each reply holds a list of
ratings of 0 to 10, of which the smallest counts; overall = sqrt(SC * PQ).

The reference draws a rating at random where it cannot read a reply twice; here such a reply has no score.

Source: VIEScore (Ku et al. 2023), and its implementation in GEdit-Bench.
"""

import json
import math
import re

DELIMITER = "||V^=^V||"
BEST = 10
_NUMBER = r"-?[0-9]{1,6}(?:\.[0-9]{1,9})?(?![0-9])"
_BARE_LIST = re.compile(r"\[[0-9]{1,3}, ?[0-9]{1,3}\]")
_BARE_NUMBER = re.compile(r"\s*[0-9]{1,3}\s*")
_VALUE = rf"(\[\s*{_NUMBER}(?:\s*,\s*{_NUMBER})*\s*\]|{_NUMBER}(?!\.))"
_FIRST = re.compile(rf'\{{\s*"?score"?\s*:\s*{_VALUE}')
_LAST = re.compile(rf'[,{{]\s*"?score"?\s*:\s*{_VALUE}\s*\}}$')


def ratings(reply: str) -> list[float] | str:
    """The ratings a reply holds, or why none can be read, in few words.

    They stand in a JSON object {"score": [...], "reasoning": ...} between two delimiters, or else from the
    first brace to the last; of broken JSON the score is read if it stands first or last. Where there are no
    braces, a list of two or one number is the reply.
    """
    found = _found(reply)
    if found is None:
        return "no score in the answer"
    values = found if isinstance(found, list) else [found]
    if not values or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return "score is no number"
    if not all(0 <= v <= BEST for v in values):
        return "rating out of range"
    return [float(v) for v in values]


def _found(reply: str):
    if reply.count(DELIMITER) == 2:
        text = reply.split(DELIMITER)[1]
    elif "{" in reply and "}" in reply:
        text = reply[reply.find("{") : reply.rfind("}") + 1]
    elif (listed := reply[reply.find("[") : reply.rfind("]") + 1]) and _BARE_LIST.fullmatch(listed):
        return _numbers(listed)
    else:
        return _numbers(reply) if _BARE_NUMBER.fullmatch(reply) else None
    text = text.strip().replace("\n", "")
    try:
        return json.loads(text)["score"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = _FIRST.match(text) or _LAST.search(text)
        return _numbers(found.group(1)) if found else None


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(_NUMBER, text)]


def overall(semantics: float, quality: float) -> float:
    """sqrt(SC * PQ), 0..10."""
    return math.sqrt(semantics * quality)
