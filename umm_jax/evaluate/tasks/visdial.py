"""Visual Dialog v1.0, validation: a hundred answers to each question of a dialogue, ranked by likelihood.

    visdial_1.0_val.json                      {"data": {"dialogs": [{image_id, caption, dialog: [{question,
                                              answer, answer_options, gt_index}]}], "questions", "answers"}}
    visdial_1.0_val_dense_annotations.json    [{image_id, round_id, gt_relevance}], round_id from 1
    VisualDialog_val2018/VisualDialog_val2018_%012d.jpg

NDCG is of the one round of a dialogue whose answers people have graded; MRR, recall and mean rank are of the
rounds that are asked, against the answer that was given.

MM-Interleaved's release leaves out the round just before the question, so its figure is of models that did
not see it: ``compat="mm_interleaved"`` does the same, and says so in the settings.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from umm_jax.conversation import Image, Text, Turn
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, mean, user
from umm_jax.evaluate.measures import ranking
from umm_jax.evaluate.source import Source, take

# What is said first, of an earlier round, and at last; as turns, or as one text.
PROMPTS = {
    "turns": ("caption: {caption}. ", "", "{question}?"),
    "text": (
        "caption: {caption}. ",
        "question: {question}? answer: {answer}. ",
        "question: {question}? answer:",
    ),
}
RECALLS = (1, 5, 10)


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        rounds: "dense", those with graded answers, one a dialogue; or "all" ten.
        form: "turns" shows earlier rounds as turns of the conversation; "text" as one text, the way of
            MM-Interleaved's release.
        compat: "mm_interleaved" is that way, and without the round before the question.
    """

    rounds: Literal["dense", "all"] = "dense"
    form: Literal["turns", "text"] = "turns"
    compat: Literal["none", "mm_interleaved"] = "none"


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    name = "visdial_1.0_val.json"
    data = take(source.json(name), "data", name, dict)
    questions, answers = take(data, "questions", name, list), take(data, "answers", name, list)
    of = lambda texts, one, key: take(texts, take(one, key, name, int), name, str)  # noqa: E731
    dense = {}
    graded = "visdial_1.0_val_dense_annotations.json"
    if settings.rounds == "dense" or (source.root / graded).exists():
        for entry in source.json(graded):
            key = take(entry, "image_id", graded, int), take(entry, "round_id", graded, int) - 1
            dense[key] = take(entry, "gt_relevance", graded, list)
    for dialog in take(data, "dialogs", name, list):
        image_id, rounds = take(dialog, "image_id", name, int), take(dialog, "dialog", name, list)
        picture = source.picture(f"VisualDialog_val2018/VisualDialog_val2018_{image_id:012d}.jpg")
        for at, asked in enumerate(rounds):
            relevance = dense.get((image_id, at))
            if relevance is None and settings.rounds == "dense":
                continue
            options = [take(answers, i, name, str) for i in take(asked, "answer_options", name, list)]
            if relevance is not None and len(relevance) != len(options):
                raise DataError(
                    f"{graded}: image {image_id}, round {at + 1} grades {len(relevance)} answers "
                    f"of {len(options)}"
                )
            # Its own in a release: the right answer's place among the options.
            right = take(asked, "gt_index", name, int)
            if not 0 <= right < len(options):
                raise DataError(f"{name}: image {image_id}, round {at + 1} has no answer {right}")
            if relevance is not None and not all(isinstance(r, (int, float)) for r in relevance):
                raise DataError(f"{graded}: image {image_id}, round {at + 1} has a grade that is no number")
            said = [
                (of(questions, r, "question"), of(answers, r, "answer")) for r in _shown(rounds, at, settings)
            ]
            caption = take(dialog, "caption", name, str)
            turns = _turns(caption, said, of(questions, asked, "question"), settings)
            yield Doc(
                f"{image_id}-{at + 1}",
                turns,
                {"image": picture},
                options=tuple(options),
                target={"right": right, "relevance": relevance},
                group={"round": str(at + 1)},
            )


def _shown(rounds: Sequence[Mapping], at: int, settings: Settings) -> Sequence[Mapping]:
    """The rounds before the one that is asked."""
    return rounds[: max(at - 1, 0)] if settings.compat == "mm_interleaved" else rounds[:at]


def _turns(
    caption: str, said: Sequence[tuple[str, str]], question: str, settings: Settings
) -> tuple[Turn, ...]:
    form = "text" if settings.compat == "mm_interleaved" else settings.form
    first, earlier, last = PROMPTS[form]
    first = first.format(caption=caption)
    if form == "text":
        rounds = "".join(earlier.format(question=q, answer=a) for q, a in said)
        return (user(Image("image"), first + rounds + last.format(question=question)),)
    asked = [last.format(question=q) for q in (*(q for q, _ in said), question)]
    turns = [user(Image("image"), first + asked[0])]
    for (_, answer), following in zip(said, asked[1:]):
        turns += [Turn("assistant", (Text(answer),)), user(following)]
    return tuple(turns)


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    if len(response.scores) != len(doc.options):
        return Marks(_worst(doc), "no score for each option")
    place = ranking.rank(response.scores, doc.target["right"])
    return Marks(_figures(doc, response.scores, place))


def _worst(doc: Doc) -> dict[str, float]:
    """Of a reply that ranks nothing: the right answer is last, nothing is gained."""
    found = _figures(doc, (), len(doc.options))
    return found | ({"ndcg": 0.0} if doc.target["relevance"] and any(doc.target["relevance"]) else {})


def _figures(doc: Doc, scores: Sequence[float], place: int) -> dict[str, float]:
    found = {"mrr": 1 / place, "mean_rank": float(place)}
    found |= {f"r@{k}": float(place <= k) for k in RECALLS}
    if scores and doc.target["relevance"]:
        gained = ranking.ndcg(scores, doc.target["relevance"])
        found |= {} if gained is None else {"ndcg": gained}
    return found


def total(records: Sequence[Record], settings: Any) -> dict[str, Score]:
    found = {name: mean(records, name) for name in ("ndcg", "mrr", *(f"r@{k}" for k in RECALLS))}
    return found | {"mean_rank": mean(records, "mean_rank", scale=1.0)}


TASK = Task(
    "visdial",
    docs,
    mark,
    "ndcg",
    total,
    Settings,
    files="annotations and pictures of v1.0 are published at visualdialog.org",
    prompt=str(PROMPTS),
    post="likelihood of the whole answer, its end included",
)
