"""MMBench: questions with options, each asked once for every order its options are turned to.

    MMBench_DEV_EN.tsv, MMBench_DEV_CN.tsv, for edition 1.1 MMBench_DEV_EN_V11.tsv; or the earlier names
    mmbench_dev_en_20231003.tsv, mmbench_dev_20230712.tsv: a table of the columns index, question, hint, A, B,
    C, D, answer, category, l2-category, image (in base64, or the index of the row that has it)

Its releases hold the turned questions as rows of their own: row 1000241 is question 241 with the last option
put first, row 2000241 with the last two. If a file has none, they are made so; a last option that speaks of
the others ("none of the above") stays last, as in VLMEvalKit's tool.

`circular`, the headline, is the share of questions that are right in every order, `vanilla` that of those
right in the published one. Letters are read as in VLMEvalKit without a judge, see ``measures/choices.py``; it
has a language model match the other replies, which are invalid here. ``strict_`` figures want a bare letter.
A question of which an order has no reply is in no circular figure. The test split has no published answers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from umm_jax.conversation import Image, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, mean, of_values, user
from umm_jax.evaluate.measures import choices, groups
from umm_jax.evaluate.source import Embedded, Source, take

PROMPTS = {
    "letter": (
        "{hint}\n{question}\n{options}\nAnswer with the option's letter from the given choices directly."
    ),
    "letter_cn": "{hint}\n{question}\n{options}\n请直接回答选项字母。",
    "vlmevalkit": (
        "Hint: {hint}\nQuestion: {question}\nOptions:\n{options}\n"
        "Please select the correct answer from the options above. \n"
    ),
}
TURN = 1_000_000  # what a further order adds to the index of a question
LETTERS = "ABCDEFGHIJ"
_NO_PICTURE = 64  # a picture in base64 is longer, an index is not
GROUPS = ("category", "l2_category")


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        split: "test" says that its answers are not published.
        language: of the questions. edition: of the release; they differ in questions and answers.
        prompt: the words around a question, see PROMPTS; "letter" is that of the language.
        matching: how letters are read: "current", or "2024" as before mid-2025, see ``choices.mmbench``.
    """

    split: Literal["dev", "test"] = "dev"
    language: Literal["en", "cn"] = "en"
    edition: Literal["1.0", "1.1"] = "1.0"
    prompt: Literal["letter", "vlmevalkit"] = "letter"
    matching: Literal["current", "2024"] = "current"

    @property
    def names(self) -> tuple[str, ...]:
        """Those the file may have."""
        whole = f"MMBench_{self.split}_{self.language}".upper().replace("MMBENCH", "MMBench")
        if self.edition == "1.1":
            return (f"{whole}_V11.tsv",)
        earlier = (f"mmbench_{self.split}_{self.language}_20231003.tsv",)
        return (
            f"{whole}.tsv",
            *earlier,
            *((f"mmbench_{self.split}_20230712.tsv",) * (self.language == "en")),
        )


@dataclass(frozen=True)
class Row:
    """A row: its index, the question it is an order of, its options by letter, and the right letter."""

    index: int
    options: Mapping[str, str]
    answer: str

    @property
    def question(self) -> int:
        return self.index % TURN


def docs(source: Source, settings: Settings) -> Iterator[Doc]:
    path = source.path(*settings.names)
    table = [_plain(row, path) for row in source.table(*settings.names)]
    if not any(row.get("answer") for row in table):
        raise DataError(
            f"{path}: has no answers; those of the test split are known to MMBench's server alone"
        )
    pictures = {take(row, "index", path): take(row, "image", path) for row in table}
    turned = any(_index(row, path) >= TURN for row in table)
    asked = [(row, _read(row, path)) for row in table]
    if not turned:
        asked += [(row, other) for row, read in asked for other in turns(read)]
    orders = groups.together((read.question, read.index) for _, read in asked)
    for row, read in asked:
        yield Doc(
            str(read.index),
            (user(Image("image"), Text(_words(row, read, settings))),),
            {"image": _picture(row["image"], pictures, f"{path}, row {row['index']}")},
            target={
                "answer": read.answer,
                "options": read.options,
                "question": read.question,
                "orders": len(orders[read.question]),
            },
            group={g: row[g.replace("_", "-")] for g in GROUPS if row.get(g.replace("_", "-"))},
        )


def _plain(row: Mapping, path) -> dict[str, str]:
    """Columns in small letters but for the options, and what is there in them; no hint is an empty one."""
    if None in row:
        raise DataError(f"{path}: a row has more columns than the first line names: {str(row[None])[:80]}")
    filled = {name: value for name, value in row.items() if value and value.strip() not in ("", "nan")}
    return {name if name in LETTERS else name.lower(): value for name, value in filled.items()}


def _index(row: Mapping[str, str], path) -> int:
    text = take(row, "index", path)
    if not text.isdecimal():
        raise DataError(f"{path}: an index must be a number, it is {text[:40]!r}")
    return int(text)


def _read(row: Mapping[str, str], path) -> Row:
    options = {letter: row[letter] for letter in LETTERS if letter in row}
    answer = take(row, "answer", path)
    if answer not in options:
        raise DataError(f"{path}, row {row['index']}: the answer {answer!r} is none of its options")
    return Row(_index(row, path), options, answer)


def turns(row: Row) -> list[Row]:
    """The further orders of a question: by i, every option moves i places on, and the last i come first."""
    letters = list(row.options)
    while len(letters) > 2 and _of_others(row.options[letters[-1]], letters[:-1]):
        letters.pop()
    found = []
    for by in range(1, len(letters)):
        to = {letter: letters[(at + by) % len(letters)] for at, letter in enumerate(letters)}
        moved = row.options | {to[letter]: row.options[letter] for letter in letters}
        found.append(Row(row.index + by * TURN, moved, to.get(row.answer, row.answer)))
    return found


def _of_others(option: str, others: Sequence[str]) -> bool:
    """Whether an option names all the others, or has the word all or none."""
    words = option.replace(",", " ").split()
    return set(others) <= set(words) or bool({"all", "none"} & {word.lower() for word in words})


def _words(row: Mapping[str, str], read: Row, settings: Settings) -> str:
    name = "letter_cn" if (settings.prompt, settings.language) == ("letter", "cn") else settings.prompt
    words = PROMPTS[name] if "hint" in row else PROMPTS[name].split("\n", 1)[1]
    return words.format(
        hint=row.get("hint"),
        question=take(row, "question", settings.names[0]),
        options="\n".join(f"{letter}. {text}" for letter, text in read.options.items()),
    )


def _picture(image: str, pictures: Mapping[str, str], where: str) -> Embedded:
    if len(image) <= _NO_PICTURE:
        image = pictures.get(image, "")
        if len(image) <= _NO_PICTURE:
            raise DataError(f"{where}: its picture is said to be in another row, which has none")
    return Embedded.in_base64(where, image)


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    options = doc.target["options"]
    letter = choices.mmbench(response.text, options, recent=settings.matching == "current")
    hits = {
        "": float(letter == doc.target["answer"]),
        "strict_": float(choices.strict_letter(response.text, options) == doc.target["answer"]),
    }
    values = {f"{by}each_order": hit for by, hit in hits.items()}
    if doc.target["question"] == int(doc.id):
        values |= {f"{by}vanilla": hit for by, hit in hits.items()}
    return Marks(values, choices.why_none(response.text, letter))


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    found = {}
    for by in ("", "strict_"):
        found[f"{by}circular"] = _circular(records, by)
        found[f"{by}vanilla"] = mean(records, f"{by}vanilla")
    for group in GROUPS:
        split = groups.together((r.doc.group[group], r) for r in records if group in r.doc.group)
        for value in sorted(split):
            found[f"circular/{group}={value}"] = _circular(split[value], "")
    return found


def _circular(records: Sequence[Record], by: str) -> Score:
    whole = _whole(records)
    invalid = sum(any(r.marks.invalid for r in rows) for rows in whole.values())
    return of_values([_all_right(rows, by) for rows in whole.values()], 100, invalid)


def _whole(records: Sequence[Record]) -> dict[int, list[Record]]:
    """{question: its records}, of questions whose orders are all there."""
    questions = groups.together((r.doc.target["question"], r) for r in records)
    return {q: rows for q, rows in questions.items() if len(rows) == rows[0].doc.target["orders"]}


def _all_right(rows: Sequence[Record], by: str) -> float:
    return float(all(r.marks.values[f"{by}each_order"] for r in rows))


def units(records: Sequence[Record], settings: Settings) -> dict[str, float]:
    return {str(question): _all_right(rows, "") for question, rows in _whole(records).items()}


TASK = Task(
    "mmbench",
    docs,
    mark,
    "circular",
    total,
    Settings,
    files="the tables are published with MMBench and with VLMEvalKit, by OpenCompass",
    reply={"mode": "text", "max_tokens": 16},
    prompt=str(PROMPTS),
    post="letter, then option text; no judge",
    units=units,
)
