"""A model for lmms-eval: ``lmms-eval --model umm_jax --model_args run=runs/demo,out=drawn --tasks ...``.

Loaded by lmms-eval alone, which brings torch; nothing here touches it.
"""

from pathlib import Path

from lmms_eval.api.model import lmms
from tqdm import tqdm

from umm_jax.evaluate import plugs
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
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[2].items())), []).append(i)
        with tqdm(total=len(requests), desc="umm_jax", unit=" replies", disable=None) as bar:
            for members in groups.values():
                for at in range(0, len(members), self.batch_size_per_gpu):
                    batch = members[at : at + self.batch_size_per_gpu]
                    for i, text in zip(batch, self._replies([requests[i] for i in batch])):
                        found[i] = text
                    bar.update(len(batch))
        return found

    def _replies(self, requests) -> list[str]:
        kwargs = dict(requests[0].args[2])
        base = self.loaded.run.reply
        settings = plugs.settings(kwargs, type(base)(**(vars(base) | {"mode": self.mode})))
        stops = kwargs.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        asked, seeds, names = [], [], []
        for request in requests:
            _, messages_of, _, doc_id, task, split = request.args
            name = f"{task}-{doc_id}"
            asked.append(plugs.conversation(name, messages_of(self.task_dict[task][split][doc_id])))
            seeds.append(seed_of(self.seed, name, 1))
            names.append(name)
        # Rows that are there already fill the last batch up, so that it needs no program of its own.
        rows = [i % len(asked) for i in range(self.batch_size_per_gpu)]
        replies = self.loaded.reply([asked[i] for i in rows], settings, [seeds[i] for i in rows])
        return [plugs.text_of(reply, stops, self.out, name) for reply, name in zip(replies, names)]

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

    def generate_until_multi_round(self, requests) -> list[str]:
        raise NotImplementedError(
            "umm_jax: rounds that a task makes up from earlier answers are not offered through lmms-eval"
        )
