"""Decoding held to the grammar: whatever a model would say, tags balance and boxes have four numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from umm_jax.errors import ConfigError
from umm_jax.markup import automaton, dialects, grammar
from umm_jax.models.decoding import Constraint, Held

UMM1 = dialects.get("umm1")
# Characters, some pieces of several, what a tokenizer writes for the first blank, and one that is no text.
WORDS = [*"0123456789.,;[]{} ax", "0.", "1.000", ", 0.", "[0", " [", "red ring", "]; [", "<image_gen>", ""]
PIECES = dict(enumerate(WORDS, 2))
MARKS = dict(enumerate(UMM1.tokens, 2 + len(WORDS)))
END, SIZE = 1, 2 + len(WORDS) + len(UMM1.tokens)


@functools.cache
def tables(level: str) -> automaton.Automaton:
    return automaton.build(UMM1, PIECES, MARKS, (END,), SIZE, level=level)


@functools.partial(jax.jit, static_argnames=("level", "length"))
def write(logits_key, level: str, length: int):
    """64 answers, each step drawn among what is allowed; tags come often."""
    constraint = Constraint(*map(jnp.asarray, tables(level)))
    rows = 64
    liking = jnp.zeros(SIZE).at[jnp.array([*MARKS])].set(1.5).at[END].set(-2.0)

    def step(carry, i):
        held, done = carry
        allowed = constraint.allowed(held, jnp.full(rows, length - i))
        key = jax.random.fold_in(logits_key, i)
        scores = liking + jax.random.gumbel(key, (rows, SIZE))
        token = jnp.argmax(jnp.where(allowed, scores, -jnp.inf), axis=-1)
        token = jnp.where(done, 0, token)
        some = allowed.any(-1) | done
        return (constraint.step(held, token), done | (token == END)), (token, some)

    start = (Held(jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.int32)), jnp.zeros(rows, bool))
    (_, done), (tokens, some) = jax.lax.scan(step, start, jnp.arange(length))
    return tokens.T, done, some


def answer(ids) -> grammar.Answer:
    def decode(ids):
        return "".join(PIECES[int(i)] for i in ids)

    said = [int(i) for i in ids if i not in (0, END)]
    return grammar.parse(grammar.lex_ids(said, MARKS, decode, UMM1), UMM1, max_calls=100)


@pytest.mark.parametrize("length", [1, 2, 7, 30, 90])
def test_full(length):
    calls = boxes = 0
    for seed in range(8):
        ids, done, some = write(jax.random.key(seed), "full", length)
        assert done.all() and some.all(), "every answer is closed and ended in its length"
        for row in np.asarray(ids):
            found = answer(row)
            # What the numbers say may be wrong still: corners swapped, no area.
            codes = {d.code for d in found.diagnostics}
            assert codes <= {"BOX_SWAP", "BOX_EMPTY", "TIME_SWAP", "EMPTY_CALL", "SEG_WRONG_CALL"}
            calls += len(found.calls)
            boxes += sum(isinstance(part, grammar.Boxes) for call in found.calls for part in call.parts)
    assert length < 90 or (calls > 500 and boxes > 50)


@pytest.mark.parametrize("length", [1, 2, 30])
def test_tags_balance_where_only_they_are_held(length):
    seen = set()
    for seed in range(8):
        ids, done, _ = write(jax.random.key(seed), "tags", length)
        assert done.all()
        seen |= {d.code for row in np.asarray(ids) for d in answer(row).diagnostics}
    assert not seen & {"UNCLOSED_CALL", "UNCLOSED_BOX", "STRAY_CLOSE", "NESTED_CALL", "MISMATCHED_CLOSE"}
    assert not seen & {"BARE_SEG", "UNKNOWN_TAG"}
    assert length < 30 or "BOX_ARITY" in seen, "places are the model's own"


def test_what_is_rendered_may_be_written():
    """Every answer of the grammar is within the tables, character by character."""
    box = grammar.Boxes(((0.12, 0.3, 0.56, 1.0), (0.0, 0.0, 0.5, 0.5)))
    said = grammar.Answer(
        (
            grammar.Text("a"),
            grammar.Ref("red ring"),
            box,
            grammar.Call("image_seg", (grammar.Text("ax"), box, grammar.Seg(), grammar.Seg())),
            grammar.Times(((0.25, 1.0),)),
        )
    )
    ids = {literal: token for token, literal in MARKS.items()} | {c: i for i, c in PIECES.items() if c}
    text, at, held = grammar.render(said, UMM1), 0, Held(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
    constraint = Constraint(*map(jnp.asarray, tables("full")))
    while at < len(text):
        literal = next((m for m in UMM1.tokens if text.startswith(m, at)), None)
        literal = literal or ("red ring" if text.startswith("red ring", at) else text[at])
        token = ids[literal]
        assert constraint.allowed(held, jnp.array([1000]))[0, token], text[:at] + " | " + literal
        held = constraint.step(held, jnp.array([token]))
        at += len(literal)
    assert constraint.allowed(held, jnp.array([1]))[0, END]


@pytest.mark.parametrize("name", ["groundinggpt", "lisa", "nextgpt", "vitron"])
def test_dialects_without_tags_cannot_be_held(name):
    with pytest.raises(ConfigError, match="has no tags"):
        automaton.build(dialects.get(name), PIECES, {}, (END,), SIZE)
