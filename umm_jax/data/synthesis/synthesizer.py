"""Dialogue `index` from the records of some folders: stages, words, checks, and another try if one fails."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from umm_jax.config import to_dict
from umm_jax.data.making import Made
from umm_jax.data.quarantine import Tally
from umm_jax.data.synthesis import checks, stages
from umm_jax.data.synthesis.exchanges import compose
from umm_jax.data.synthesis.material import Material
from umm_jax.data.synthesis.rewriters import TemplateRewriter

# Of what is made from the same records, settings and seed.
VERSION = 2
TRIES = 8


class Synthesizer:
    """For :func:`making.make_records`: dialogue `index` begins with record `index` of the material.

    A plan that a stage or a check refuses is made again from other draws, a few times; what fails then is
    left out and counted by the stage or check. Nothing else takes its place.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        settings: stages.Stages | None = None,
        *,
        rewriter: Any = None,
        seed: int = 0,
        split: str = "train",
    ):
        self.settings = settings or stages.Stages()
        self.material = Material(folders, split)
        self.rewriter = rewriter or TemplateRewriter()
        self.seed, self.split = seed, split
        self._from = [source.manifest["how"] for source in self.material.sources]

    def __len__(self) -> int:
        return len(self.material)

    def recipe(self) -> dict[str, Any]:
        """From which the same dialogues could be made again; see the `how` of make_records."""
        facts = {"synthesis": VERSION, "seed": self.seed, "split": self.split}
        return {**facts, **self.rewriter.recipe(), "settings": to_dict(self.settings), "from": self._from}

    def __call__(self, index: int) -> Made:
        tally = Tally()
        chain, source, license = self.material.chain(index % len(self.material))
        # A later round over the same records draws otherwise.
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        reason = ""
        for attempt in range(TRIES):
            made, reason = self._plan(chain, license, rng)
            if made is None:
                continue
            written = [self.rewriter(exchange, rng) for exchange in made.exchanges]
            for exchange, rewritten in zip(made.exchanges, written):
                exchange.meta.update({"words": rewritten.query, "by": rewritten.by})
            terms = sorted(set(made.licenses))
            facts = {
                "source": f"synthesis of {source}",
                "license": terms[0] if len(terms) == 1 else " AND ".join(term or "unnamed" for term in terms),
                "split": self.split,
                "provenance": tuple(f"stage {stage}" for stage in self.settings.stages),
                "meta": {"attempt": attempt},
            }
            record = compose(f"dialogue-{index}", made.exchanges, [w.words for w in written], facts)
            failed = checks.failures(record)
            for check in failed:
                tally.count("checks failed", check)
            if not failed:
                tally.count("tries", str(attempt + 1))
                for rewritten in written:
                    tally.count("words by", rewritten.by)
                    for note in rewritten.notes:
                        tally.count("rewriter", note)
                return Made(record, tally)
            reason = f"check {failed[0]}"
        tally.count("left out", reason)
        return Made(None, tally)

    def _plan(self, chain, license: str, rng: random.Random) -> tuple[stages.Plan | None, str]:
        plan = stages.stateful(chain, license, self.material, self.settings, rng)
        if plan is None:
            return None, "stage 1: leans on more than pictures"
        if 2 in self.settings.stages:
            plan = stages.long_range(plan, self.material, self.settings, rng)
            if plan is None:
                return None, "stage 2: no reference singles the picture out"
        if 3 in self.settings.stages:
            # Every third dialogue keeps an answer of one part.
            told = (
                stages.interleaved(plan, self.material, self.settings, rng) if rng.random() < 2 / 3 else plan
            )
            if told is None:
                return None, "stage 3: no plan fits"
            plan = told
        fresh = [stages.replace(exchange, meta={}) for exchange in plan.exchanges]
        return stages.Plan(fresh, plan.licenses), ""
