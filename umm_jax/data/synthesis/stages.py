"""The three stages of synthesis, as changes to a plan: a list of exchanges and what each refers to.

    1  stateful       a chain of exchanges about pictures that come one from another
    2  long-range     distractors before the last question, which then says by the history what it means
    3  interleaved    answers of several texts and pictures; questions back; what cannot be done

A stage takes a plan and gives a plan, or None where this material does not allow it. Words are written after
all stages, by ``rewriters``; ``checks`` then reads the finished record and trusts none of this.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from umm_jax.data.synthesis.exchanges import Exchange, Picture, pooled
from umm_jax.data.synthesis.material import Material, distinct, keys
from umm_jax.data.synthesis.references import NAMES, ORDINALS, Reference, history, possible
from umm_jax.errors import ConfigError


@dataclass(frozen=True)
class Stages:
    """What is composed, and how often.

    Attributes:
        stages: of 1, 2, 3.
        turns: most exchanges of stage 1.
        join: share of dialogues to which other records about the same pictures are joined.
        distractors: how many come between a picture and the question about it, by weight.
        kinds: what they are, by weight: "talk", "question" (about a picture of its own), "draw", "edit".
        negatives: share of dialogues of stage 2 whose last question is about the last picture and says
            nothing of it, so that a model does not learn that the last is never meant.
        references: how pictures are referred to, by weight; of those a history allows.
        interleaved: plans of stage 3, by weight.
    """

    stages: tuple[int, ...] = (1, 2, 3)
    turns: int = 5
    join: float = 0.5
    distractors: Mapping[str, float] = field(
        default_factory=lambda: {"1": 0.35, "2": 0.30, "3": 0.20, "4": 0.15}
    )
    kinds: Mapping[str, float] = field(
        default_factory=lambda: {"talk": 0.3, "question": 0.3, "draw": 0.25, "edit": 0.15}
    )
    negatives: float = 0.2
    references: Mapping[str, float] = field(
        default_factory=lambda: {
            "order": 0.05,
            "drawn": 0.1,
            "sent": 0.05,
            "content": 0.3,
            "name": 0.06,
            "other": 0.1,
            "before": 0.15,
            "topic": 0.1,
        }
    )
    interleaved: Mapping[str, float] = field(
        default_factory=lambda: {
            "steps": 0.2,
            "recap": 0.2,
            "before_after": 0.15,
            "story": 0.1,
            "clarify": 0.175,
            "refuse": 0.175,
        }
    )

    def __post_init__(self):
        if not self.stages or set(self.stages) - {1, 2, 3}:
            raise ConfigError(f"stages are of 1, 2 and 3, got {list(self.stages)}")
        if self.turns < 1 or not (0 <= self.negatives <= 1 and 0 <= self.join <= 1):
            raise ConfigError("turns must be positive, and negatives and join shares from 0 to 1")
        known = {"kinds": {"talk", "question", "draw", "edit"}, "interleaved": {*PLANS, "story"}}
        known["distractors"] = {str(n) for n in range(1, len(ORDINALS) - 1)}
        known["references"] = {"order", "drawn", "sent", "content", "name", "other", "before", "topic"}
        for name, allowed in known.items():
            weights = getattr(self, name)
            if unknown := set(weights) - allowed:
                raise ConfigError(f"{name}: {sorted(unknown)} are not among {', '.join(sorted(allowed))}")
            if not weights or min(weights.values()) < 0 or not sum(weights.values()):
                raise ConfigError(f"{name}: weights must not be negative, and not all zero")


def weighted(rng: random.Random, weights: Mapping[str, float]) -> str:
    """One of the names, in the order in which they are written."""
    return rng.choices(list(weights), list(weights.values()))[0]


@dataclass
class Plan:
    """A dialogue in the making, and the licences of what is in it."""

    exchanges: list[Exchange]
    licenses: list[str]


# --- stage 1 ------------------------------------------------------------------------------------------------


def stateful(
    chain: Sequence[Exchange], license: str, material: Material, settings: Stages, rng: random.Random
) -> Plan | None:
    """The longest beginning of a record that can be moved, ended before what leans on more than a picture.

    Records about the same pictures are joined to it: what a picture was drawn for comes before what is done
    to it (a drawing and its edit; drawings, and what is composed of them), and what others say of the last
    picture comes after it (an edit and a question; a question, another, an edit).
    """
    kept = []
    for exchange in chain[: settings.turns]:
        if not exchange.stands_alone:
            break
        kept.append(exchange)
    if not kept or not kept[0].pictures:
        return None
    licenses = [license]
    if rng.random() < settings.join:
        kept = _begun(kept, licenses, material, settings, rng)
        while len(kept) < settings.turns:
            shown = [picture for exchange in kept for picture in exchange.pictures]
            found = material.of(shown[-1], rng, kept)
            # What brings another picture as well would have to say which of them it means.
            if found is None or any(p.key != shown[-1].key for p in found[0].brings):
                break
            kept.append(replace(found[0], brings=()))
            licenses.append(found[1])
    return Plan(pooled(kept), licenses)


def _begun(
    kept: list[Exchange], licenses: list[str], material: Material, settings: Stages, rng: random.Random
) -> list[Exchange]:
    """The pictures that the first exchange brings are drawn before it, where the data says how."""
    first = kept[0]
    found = [material.request(picture, rng, kept) for picture in first.brings]
    # With some drawn and some brought they would come in another order than the words count them.
    if not found or None in found or len(kept) + len(found) > settings.turns:
        return kept
    licenses += [license for _, license in found]
    about = first.about and first.about.key
    needs = tuple(picture for picture in first.brings if picture.key != about)
    return [*(drawn for drawn, _ in found), replace(first, brings=(), needs=needs), *kept[1:]]


# --- stage 2 ------------------------------------------------------------------------------------------------


def long_range(plan: Plan, material: Material, settings: Stages, rng: random.Random) -> Plan | None:
    """The last question of a plan, or one made for it, asked across distractors in words of the history.

    Which of all pictures is meant is drawn evenly: whoever always takes the last is right as often as by
    chance, neither more nor less.
    """
    negative = rng.random() < settings.negatives
    source, dependent = _split(plan.exchanges, rng, negative)
    licenses = list(plan.licenses)
    avoid = keys(plan.exchanges)
    count = int(weighted(rng, settings.distractors))
    shows, talks = [], []
    for _ in range(count):
        found = material.single(weighted(rng, settings.kinds), rng, avoid)
        if found is None:
            continue
        exchange, license = found
        licenses.append(license)
        avoid |= keys([exchange])
        (shows if exchange.pictures else talks).append(exchange)
    if not talks:  # one at least comes between: the exchange just before is not to be enough
        exchange, license = material.single("talk", rng, avoid)
        licenses.append(license)
        talks.append(exchange)
    own = len(distinct(source))
    others = [len(keys([exchange])) for exchange in shows]
    # Pictures of others that come before: all of them where the last picture is meant.
    before = len(shows) if negative or rng.random() < 1 / (own + sum(others)) else _fewer(rng, len(shows))
    # The last exchange before the question shows no picture, or the last picture would be seen in it; other
    # talk may come first, for something to be referred to.
    opening = [t for t in talks[1:] if rng.random() < 0.4]
    between = [*shows[before:], *(t for t in talks[1:] if t not in opening)]
    rng.shuffle(between)
    told = [*shows[:before], *opening, *source, *between, talks[0]]
    if negative:
        return Plan([*told, replace(dependent, role="negative")], licenses)
    reference = _refer(told, dependent.about, settings, rng)
    if reference is None:
        return None
    if reference.kind == "name":
        k = _named_at(told, dependent.about)
        told[k] = replace(told[k], name=str(reference.value))
    return Plan([*told, replace(dependent, role="dependent", reference=reference)], licenses)


def _fewer(rng: random.Random, count: int) -> int:
    return rng.randrange(count) if count else 0


def _split(exchanges: Sequence[Exchange], rng: random.Random, last: bool) -> tuple[list[Exchange], Exchange]:
    """What shows a picture, and a question about it: the record's next, or one that every picture allows.

    `last` asks about the last picture shown.
    """
    own = [
        k
        for k in range(1, len(exchanges))
        if exchanges[k].about is not None
        and not exchanges[k].brings
        and keys(exchanges[:k])
        and exchanges[k].op != "story"
    ]
    if own and rng.random() < 0.7:
        k = rng.choice(own)
        return [replace(e, role="source") for e in exchanges[:k]], exchanges[k]
    source = [replace(e, role="source") for e in exchanges]
    shown = [picture for exchange in source for picture in exchange.pictures]
    picture = shown[-1] if last else rng.choice(shown)
    if picture.words and rng.random() < 0.5:
        return source, Exchange(
            "describe", "say what it shows", (picture.words,), about=picture, source="made"
        )
    return source, Exchange("recall", "show it again", (picture,), about=picture, source="made")


def _refer(
    told: Sequence[Exchange], picture: Picture, settings: Stages, rng: random.Random
) -> Reference | None:
    facts = {p.key: (p.facts, p.maybe) for p in distinct(told)}
    known = history([exchange.told(k) for k, exchange in enumerate(told)], facts)
    by_kind: dict[str, list[Reference]] = {}
    for reference in possible(picture.key, known):
        by_kind.setdefault(reference.kind, []).append(reference)
    if _named_at(told, picture) is not None:
        by_kind["name"] = [Reference("name", name) for name in NAMES]
    weights = {kind: settings.references.get(kind, 0.0) for kind in by_kind}
    if not sum(weights.values()):
        return None
    return rng.choice(by_kind[weighted(rng, weights)])


def _named_at(told: Sequence[Exchange], picture: Picture) -> int | None:
    """The exchange of the source after which "call it ..." means this picture."""
    places = (k for k, e in enumerate(told) if e.role == "source" and e.pictures)
    return next((k for k in places if told[k].pictures[-1].key == picture.key), None)


# --- stage 3 ------------------------------------------------------------------------------------------------


def interleaved(plan: Plan, material: Material, settings: Stages, rng: random.Random) -> Plan | None:
    """One plan of an answer with several parts, of those this dialogue allows."""
    weights = dict(settings.interleaved)
    while weights and sum(weights.values()):
        kind = weighted(rng, weights)
        licenses = list(plan.licenses)
        if kind == "story":
            made = _story(plan.exchanges, licenses, material, rng)
        else:
            made = PLANS[kind](plan.exchanges, rng)
        if made is not None:
            return Plan(made, licenses)
        del weights[kind]
    return None


def _steps(exchanges: list[Exchange], rng: random.Random) -> list[Exchange] | None:
    """Two or more edits that follow one another, asked for at once and shown step by step."""
    starts = [
        k
        for k in range(1, len(exchanges) - 1)
        if all(e.op == "edit" and not e.brings and e.reference is None for e in exchanges[k : k + 2])
    ]
    if not starts:
        return None
    k = rng.choice(starts)
    end = k + 2
    while end < len(exchanges) and exchanges[end].op == "edit" and not exchanges[end].brings and end - k < 4:
        if exchanges[end].reference is not None:
            break
        end += 1
    run = exchanges[k:end]
    answer: list = []
    for number, edit in enumerate(run):
        shown = [part for part in edit.answer if isinstance(part, Picture)]
        answer += [f"{'first' if number == 0 else 'then'} {edit.said}", *shown]
    said = "step by step: " + ", then ".join(edit.said for edit in run)
    made = replace(run[0], op="steps", said=said, answer=tuple(answer))
    return [*exchanges[:k], made, *exchanges[end:]]


def _recap(exchanges: list[Exchange], rng: random.Random) -> list[Exchange] | None:
    """All pictures so far, each with its place in words."""
    shown = distinct(exchanges)
    if not 2 <= len(shown) <= len(ORDINALS):
        return None
    answer: list = []
    for number, picture in zip(ORDINALS, shown):
        answer += [f"the {number} picture" + (f": {picture.words}" if picture.words else ""), picture]
    said = rng.choice(("show me all the pictures so far, one by one", "let us look at every picture again"))
    return [*exchanges, Exchange("recap", said, tuple(answer), source="made")]


def _before_after(exchanges: list[Exchange], rng: random.Random) -> list[Exchange] | None:
    """What the last edit was made of, and what became of it."""
    edits = [e for e in exchanges if e.op == "edit" and e.about is not None and _one_made(e)]
    if not edits:
        return None
    after = edits[-1].pictures[-1]
    said = rng.choice(("show the last change, before and after", "compare before and after the last change"))
    answer = ("before", edits[-1].about, f"after: {edits[-1].said}", after)
    return [*exchanges, Exchange("before_after", said, answer, about=after, source="made")]


def _one_made(exchange: Exchange) -> bool:
    return len(exchange.pictures) == len(exchange.brings) + 1


def _story(
    exchanges: list[Exchange], licenses: list[str], material: Material, rng: random.Random
) -> list[Exchange] | None:
    """An answer of several pictures as a record has it, after other talk."""
    found = material.single("story", rng, keys(exchanges))
    if found is None:
        return None
    licenses.append(found[1])
    return [*exchanges, replace(found[0], role="")]


def _clarify(exchanges: list[Exchange], rng: random.Random) -> list[Exchange] | None:
    """A question that fits several pictures, the question back, and the user's answer."""
    last = exchanges[-1]
    shown = distinct(exchanges[:-1])
    if last.role != "dependent" or last.about is None or not 2 <= len(shown) <= len(ORDINALS):
        return None
    number = [picture.key for picture in shown].index(last.about.key) + 1
    asked = f"in the picture: {last.said}" if last.op != "recall" else "show me the picture again"
    named = [f"the {ORDINALS[k]}" for k in range(len(shown))]
    question = f"which picture do you mean, {', '.join(named[:-1])} or {named[-1]}?"
    vague = Exchange("clarify", asked, (question,), needs=tuple(shown), role="reply", source="made")
    plain = replace(last, reference=Reference("order", number))
    return [*exchanges[:-1], vague, plain]


def _refuse(exchanges: list[Exchange], rng: random.Random) -> list[Exchange] | None:
    """A question about a picture that was never shown."""
    last = exchanges[-1]
    count = len(distinct(exchanges))
    if count + 2 > len(ORDINALS) or last.op == "chat":
        return None
    number = rng.randint(count + 1, min(count + 2, len(ORDINALS)))
    here = "only one picture" if count == 1 else f"only {count} pictures"
    answer = f"there is no {ORDINALS[number - 1]} picture here, {here}"
    said = last.said if last.op != "recall" else "say what it shows"
    shown = tuple(distinct(exchanges))
    made = Exchange(
        "refuse", said, (answer,), needs=shown, reference=Reference("order", number), source="made"
    )
    return [*exchanges, made]


PLANS = {
    "steps": _steps,
    "recap": _recap,
    "before_after": _before_after,
    "clarify": _clarify,
    "refuse": _refuse,
}
