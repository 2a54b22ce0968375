"""A model for VLMEvalKit, which has no place for plugs: one line in its ``vlmeval/config.py`` names it,

    supported_VLM["my_run"] = partial(UmmJax, run="runs/demo")

after ``from umm_jax.evaluate.plugs.vlmeval import UmmJax``. Multi-turn data sets come through `chat_inner`.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from vlmeval.vlm.base import BaseModel

from umm_jax.evaluate import plugs
from umm_jax.evaluate.world_expert import attended
from umm_jax.generate import load_run, seed_of


class UmmJax(BaseModel):
    """A trained run.

    Args:
        run: its folder. step, weights: as in ``umm eval``.
        out: folder for pictures it draws. mode: "text" never draws.
        seed: of all replies; each one's is drawn from it and from what was asked.
        kwargs: VLMEvalKit's settings of generation: max_new_tokens, temperature, top_p, num_beams, do_sample.
    """

    INTERLEAVE = True

    def __init__(
        self, run: str, step=None, weights=None, out=None, mode: str = "text", seed: int = 0, **kwargs
    ):
        super().__init__()
        self.loaded = attended(load_run(run, step, weights))
        base = self.loaded.run.reply
        self.settings = plugs.settings(kwargs, replace(base, mode=mode))
        self.out, self.seed = Path(out) if out else None, seed

    def generate_inner(self, message, dataset=None) -> str:
        """A reply to one message: [{"type": "text" or "image", "value": text or path}]."""
        return self._reply([{"role": "user", "content": message}])

    def chat_inner(self, messages, dataset=None) -> str:
        """A reply to a conversation: [{"role", "content": as above}], the user's turn last."""
        return self._reply(messages)

    def _reply(self, messages) -> str:
        # They hand over no id: what is asked is one.
        name = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
        turned = [{"role": m["role"], "content": [_item(item) for item in m["content"]]} for m in messages]
        asked = plugs.conversation(name, turned)
        reply = self.loaded.reply([asked], self.settings, [seed_of(self.seed, name, 1)])[0]
        return plugs.text_of(reply, [], self.out, name)


def _item(item) -> dict:
    key = {"text": "text", "image": "url"}.get(item["type"], "value")
    return {"type": item["type"], key: item["value"]}
