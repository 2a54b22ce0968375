"""A model for lmms-eval: ``lmms-eval --model umm_jax --model_args run=runs/demo,out=drawn --tasks ...``.

Loaded by lmms-eval alone, which brings torch; nothing here touches it.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmms_eval.api.model import lmms
from tqdm import tqdm

from umm_jax.conversation import Conversation
from umm_jax.evaluate import plugs
from umm_jax.evaluate.measures.groups import together
from umm_jax.evaluate.world_expert import attended
from umm_jax.generate import load_run, seed_of


class UmmJax(lmms):
    """A trained run.

    Args:
        run: its folder. step, weights: as in ``umm eval``.
        out: folder for pictures it draws.
        mode: "text" never draws; "auto" leaves it to the model; "image" draws first.
        batch_size: requests answered together. seed: of all replies.
        device: ignored, as JAX chooses.
    """

    is_simple = False

    def __init__(
        self,
        run: str,
        step: int | None = None,
        weights: str | None = None,
        out: str | None = None,
        mode: str = "text",
        batch_size: int | str = 8,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.loaded = attended(load_run(run, step, weights))
        self.out, self.mode, self.seed = Path(out) if out else None, mode, int(seed)
        self.batch_size_per_gpu = 8 if batch_size == "auto" else int(batch_size)

    def generate_until(self, requests) -> list[str]:
        """One string for each request; what was asked together does not change a reply."""
        found: list[str] = [""] * len(requests)
        groups = together((repr(sorted(r.args[2].items())), i) for i, r in enumerate(requests))
        with tqdm(total=len(requests), desc="umm_jax", unit=" replies", disable=None) as bar:
            for members in groups.values():
                for at in range(0, len(members), self.batch_size_per_gpu):
                    batch = members[at : at + self.batch_size_per_gpu]
                    asked = [(self._first(requests[i]), 1) for i in batch]
                    for i, text in zip(batch, self._replies(asked, requests[batch[0]].args[2])):
                        found[i] = text
                    bar.update(len(batch))
        return found

    def generate_until_multi_round(self, requests) -> list[list[str]]:
        """The strings of all rounds of each request: a task makes the messages of a round of those before."""
        return [
            self._rounds(request) for request in tqdm(requests, desc="umm_jax", unit=" docs", disable=None)
        ]

    def _rounds(self, request) -> list[str]:
        _, messages_of, kwargs, doc_id, task, split = request.args
        doc, asked, info, said = self.task_dict[task][split][doc_id], self._first(request), None, []
        while True:
            said += self._replies([(asked, len(said) + 1)], kwargs)
            following = messages_of(
                doc, round_idx=len(said), previous_output=list(said), previous_round_info=info
            )
            # (messages, whether that was the last round, what was said, what the task keeps of it)
            if not isinstance(following, tuple) or len(following) != 4 or following[1]:
                return said
            messages, _, _, info = following
            asked = plugs.conversation(asked.id, messages)

    def _first(self, request) -> Conversation:
        _, messages_of, _, doc_id, task, split = request.args
        return plugs.conversation(f"{task}-{doc_id}", messages_of(self.task_dict[task][split][doc_id]))

    def _replies(self, asked: Sequence[tuple[Conversation, int]], kwargs) -> list[str]:
        """Replies to conversations, each with the number of its round."""
        base = self.loaded.run.reply
        settings = plugs.settings(kwargs, replace(base, mode=self.mode))
        stops = kwargs.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        # Rows that are there already fill the last batch up, so that it needs no program of its own.
        rows = [asked[i % len(asked)] for i in range(self.batch_size_per_gpu)]
        seeds = [seed_of(self.seed, c.id, turn) for c, turn in rows]
        replies = self.loaded.reply([c for c, _ in rows], settings, seeds)
        return [
            plugs.text_of(reply, stops, self.out, c.id if turn == 1 else f"{c.id}-{turn}")
            for reply, (c, turn) in zip(replies, asked)
        ]

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """(log-probability of the continuation as a whole reply, whether it is the greedy one)."""
        found = []
        for request in tqdm(requests, desc="umm_jax", unit=" options", disable=None):
            context, continuation, visuals_of, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            pictures = [{"type": "image", "url": image} for image in visuals_of(doc)]
            content = [*pictures, {"type": "text", "text": context}]
            asked = plugs.conversation(f"{task}-{doc_id}", [{"role": "user", "content": content}])
            text = continuation(doc) if callable(continuation) else continuation
            likely = self.loaded.likelihood(asked, [text.strip()])[0]
            found.append((likely.logprob, likely.greedy))
        return found
