"""How probable a model finds given replies: for benchmarks that rank answers and have none written."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
from flax import nnx

from umm_jax import families
from umm_jax.conversation import Conversation, Text, Turn
from umm_jax.data.packing import batch, pack_row
from umm_jax.families.contract import Replier
from umm_jax.models.layers import Keys
from umm_jax.stream import rounded_up, stream_length


class Likely(NamedTuple):
    """How probable a reply is, in nats; and whether greedy decoding would give just it."""

    logprob: float
    greedy: bool


class Likelihood:
    """Log-probabilities of texts as whole replies, their end included.

    Args:
        family: its name. replier: whose parameters, config and serializer are used.
        rows: options that are read together; the last ones are filled up with repetitions.
        round_tokens: lengths are rounded up to multiples of it, so that few shapes are compiled.
    """

    def __init__(self, family: str, replier: Replier, *, rows: int = 20, round_tokens: int = 64):
        self.replier, self.rows, self.round_tokens = replier, rows, round_tokens
        build = families.get(family).model.build
        graphdef = nnx.split(nnx.eval_shape(lambda: build(replier.config, Keys(0))))[0]

        def nll(params, rows):
            return nnx.merge(graphdef, nnx.State(params)).text_likelihood(rows)

        self._nll = jax.jit(nll)

    def __call__(self, conversation: Conversation, options: Sequence[str]) -> list[Likely]:
        """For each option, as the reply to `conversation`.

        Raises:
            DataError: the conversation cannot be answered, or one of the options is empty.
        """
        conversation.check_unanswered()
        serializer = self.replier.serializer
        # Only the reply counts, though records may learn earlier turns too.
        silent = tuple(replace(turn, loss=False) for turn in conversation.turns)
        said = replace(conversation, turns=silent)
        streams = [
            serializer(said.with_turn(Turn("assistant", (Text(option),), loss=True))) for option in options
        ]
        found: list[Likely] = []
        for start in range(0, len(streams), self.rows):
            part = streams[start : start + self.rows]
            filled = (part + [part[-1]] * self.rows)[: self.rows]
            lengths = [stream_length(stream) for stream in filled]
            budget = {axis: self._room(max(one[axis] for one in lengths)) for axis in lengths[0]}
            rows = batch([pack_row([stream], serializer.spec, budget) for stream in filled])
            nll, greedy = self._nll(self.replier.params, rows)
            found += [Likely(-float(x), bool(g)) for x, g in zip(nll[: len(part)], greedy)]
        return found

    def _room(self, size: int) -> int:
        """Of an axis: no fewer than one, long ones rounded up."""
        return rounded_up(size, self.round_tokens) if size >= self.round_tokens // 4 else max(size, 1)
