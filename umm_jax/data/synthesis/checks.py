"""What a dialogue must be, told from the finished record alone.

| id | what fails it |
|---|---|
| reference-lost | the reference of a dependent turn cannot be read in its words |
| reference-ambiguous | with the whole history it fits no picture, or several |
| meaning-changed | it fits another picture than the one the answer is about |
| solvable-alone | it fits the right picture without any history |
| antecedent-not-needed | it fits the right picture when the exchanges that show it are taken away |
| solvable-from-last | it fits the right picture with the exchange just before as the only history |
| leaks-answer | the user's words tell the answer, or what only the answer shows |
| not-negative | a negative whose last picture is not the one it is about, or that refers to one by words |
| repeated-sentence | an answer says the same sentence twice |
| too-long | words of a user beyond forty, or twice those of the source |
| index-token | a file name, an address or a control token in the words |
"""

import re
from collections.abc import Sequence

from umm_jax.conversation import Conversation, Image, Turn
from umm_jax.data.synthesis.references import Facts, Reference, Told, history, read, resolve

IDS = tuple(re.findall(r"^\| ([a-z-]+) \|", __doc__, re.MULTILINE)[1:])
# Those of a dependent turn: without one of them it is not known to need the history.
NECESSITY = IDS[: IDS.index("solvable-from-last") + 1]
_LONGEST = 40
_TOKENS = re.compile(r"<\|?[\w/ ]+\|?>|https?:|\b[\w-]+\.(?:jpe?g|png|webp)\b")


def told(record: Conversation) -> tuple[list[Told], Facts]:
    """The exchanges of a synthesised record as a reader sees them, and what is said of its pictures."""
    found = []
    for t in range(0, len(record.turns), 2):
        user, bot = record.turns[t : t + 2]
        meta = user.meta
        refs = [tuple(p.ref for p in turn.parts if isinstance(p, Image)) for turn in (user, bot)]
        found.append(Told(t // 2, user.text, *refs, meta.get("about"), meta.get("name", "")))
    facts = {
        ref: (None if known["facts"] is None else frozenset(known["facts"]), frozenset(known["maybe"]))
        for ref, known in record.meta["pictures"].items()
    }
    return found, facts


def failures(record: Conversation) -> list[str]:
    """The ids of the checks this record fails, in the order of the table; those of a turn once for each."""
    found: list[str] = []
    exchanges, facts = told(record)
    for k, exchange in enumerate(exchanges):
        user, bot = record.turns[2 * k : 2 * k + 2]
        role = user.meta.get("role")
        if role == "dependent":
            found += _dependent(exchanges[:k], exchange, user, facts)
        if role == "negative":
            last = history(exchanges[:k], facts).last
            if last != exchange.about or "reference" in user.meta:
                found.append("not-negative")
        found += _words(user, bot)
    return sorted(found, key=IDS.index)


def _dependent(before: Sequence[Told], exchange: Told, user: Turn, facts: Facts) -> list[str]:
    reference = read(user.text, user.meta["words"], user.op or "")
    if reference is None:
        return ["reference-lost"]
    fits = resolve(reference, history(before, facts))
    if len(fits) != 1:
        return ["reference-ambiguous"]
    if fits != [exchange.about]:
        return ["meaning-changed"]
    found = []
    if resolve(reference, history([], facts)) == fits:
        found.append("solvable-alone")
    without = [e for e in before if exchange.about not in (*e.brings, *e.answers)]
    if resolve(reference, history(without, facts)) == fits:
        found.append("antecedent-not-needed")
    if resolve(reference, history(before[-1:], facts)) == fits:
        found.append("solvable-from-last")
    return found


def _words(user: Turn, bot: Turn) -> list[str]:
    found = []
    answer, said = bot.text.lower().strip(), user.text.lower()
    if user.op in ("ask", "describe") and len(answer.split()) > 1 and answer in said:
        found.append("leaks-answer")
    sentences = [part.text.strip() for part in bot.parts if getattr(part, "text", "").strip()]
    if len(set(sentences)) < len(sentences):
        found.append("repeated-sentence")
    source = user.meta.get("query", "")
    if len(said.split()) > max(_LONGEST, 2 * len(source.split()) + 12):
        found.append("too-long")
    if _TOKENS.search(user.text):
        found.append("index-token")
    return found


def recency(record: Conversation) -> list[tuple[bool, float]]:
    """(whether the last picture is the right one, one by the number of pictures) of every dependent turn."""
    exchanges, facts = told(record)
    found = []
    for k, exchange in enumerate(exchanges):
        if record.turns[2 * k].meta.get("role") == "dependent":
            known = history(exchanges[:k], facts)
            found.append((known.last == exchange.about, 1 / len(known.pictures)))
    return found


def distance(record: Conversation) -> list[int]:
    """Of every dependent turn, the exchanges from the last that shows its picture to it."""
    exchanges, _ = told(record)
    found = []
    for k, exchange in enumerate(exchanges):
        if record.turns[2 * k].meta.get("role") == "dependent":
            shown = [j for j in range(k) if exchange.about in (*exchanges[j].brings, *exchanges[j].answers)]
            found.append(k - shown[-1])
    return found


__all__ = ["IDS", "Reference", "distance", "failures", "recency", "told"]
