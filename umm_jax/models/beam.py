"""Beam search: which texts run on, which are finished, which is the best. numpy, on the host.

The rules (how many candidates are looked at, when a row is done, how texts are ranked) are those of the
library the release pins for its evaluation, transformers 4.31.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Hypothesis:
    """A finished text: its ids without the stop token, that token or None, and the score it is ranked by."""

    ids: tuple[int, ...]
    stop: int | None
    score: float


class BeamSearch:
    """The books of beam search for several rows at once; log-probabilities come from the caller.

    A row keeps `beams` running texts. Each step the caller hands in the best :attr:`candidates`
    continuations: those that end in a stop token become finished texts if they are among the best `beams`,
    the others run on. A row is done when it has `beams` finished texts and no running one can still beat the
    worst of them. Finished texts are ranked by the sum of log-probabilities over length ** length_penalty,
    where the length counts a begin token before the text.

    Args:
        beams: running texts of a row; stops: ids that end a text.
        budget: most tokens of each row [B]; a row of 0 takes no part.
    """

    def __init__(self, beams: int, stops: Sequence[int], budget: np.ndarray, length_penalty: float = 1.0):
        rows = len(budget)
        self.beams, self.stops, self.budget = beams, frozenset(stops), np.asarray(budget)
        self.length_penalty = length_penalty
        # At first all beams of a row are the same empty text: only one may be continued.
        self.scores = np.full((rows, beams), -1e9, np.float32)
        self.scores[:, 0] = 0.0
        self.running: list[list[tuple[int, ...]]] = [[()] * beams for _ in range(rows)]
        self.finished: list[list[Hypothesis]] = [[] for _ in range(rows)]
        self._done = self.budget <= 0

    @property
    def candidates(self) -> int:
        """How many continuations of a row are looked at: enough that `beams` remain if every stop is met."""
        return max(2, 1 + len(self.stops)) * self.beams

    @property
    def done(self) -> bool:
        """Whether every row is."""
        return bool(self._done.all())

    def advance(self, totals: np.ndarray, chosen: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes one step.

        Args:
            totals: [B, candidates] sums of log-probabilities, best first.
            chosen: [B, candidates] which beam and token each is, as beam * vocab + token.

        Returns:
            tokens and sources [B * beams]: the token each beam reads next, and the beam it continues,
            counted over all rows.
        """
        rows = len(self.budget)
        tokens = np.zeros((rows, self.beams), np.int32)
        sources = np.tile(np.arange(self.beams), (rows, 1))
        for row in np.flatnonzero(~self._done):
            running, scores = [], []
            for rank, (total, pick) in enumerate(zip(totals[row], chosen[row])):
                beam, token = divmod(int(pick), vocab)
                if token in self.stops:
                    if rank < self.beams and np.isfinite(total):
                        self._finish(row, self.running[row][beam], token, float(total))
                    continue
                at = len(running)
                running.append((*self.running[row][beam], token))
                scores.append(total)
                tokens[row, at], sources[row, at] = token, beam
                if len(running) == self.beams:
                    break
            length = len(running[0])
            self.running[row], self.scores[row] = running, scores
            self._done[row] = self._hopeless(row, float(totals[row].max()), length + 1)
            if not self._done[row] and length >= self.budget[row]:
                for text, score in zip(running, scores):
                    self._finish(row, text, None, float(score))
                self._done[row] = True
        sources += np.arange(rows)[:, None] * self.beams
        return tokens.reshape(-1), sources.reshape(-1)

    def best(self) -> list[Hypothesis]:
        """The best finished text of each row."""
        nothing = Hypothesis((), None, 0.0)
        return [max(f, key=lambda h: h.score) if f else nothing for f in self.finished]

    def _finish(self, row: int, ids: tuple[int, ...], stop: int | None, total: float) -> None:
        score = total / (len(ids) + 1) ** self.length_penalty
        found = self.finished[row]
        if len(found) < self.beams or score > min(h.score for h in found):
            found.append(Hypothesis(ids, stop, score))
            if len(found) > self.beams:
                found.remove(min(found, key=lambda h: h.score))

    def _hopeless(self, row: int, best: float, length: int) -> bool:
        found = self.finished[row]
        if len(found) < self.beams:
            return False
        return min(h.score for h in found) >= best / length**self.length_penalty
