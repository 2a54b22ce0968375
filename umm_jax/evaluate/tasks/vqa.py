"""Visual question answering by ten people's answers: VQAv2, OK-VQA, VizWiz, TextVQA.

    VQAv2    v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json, val2014/
    OK-VQA   OpenEnded_mscoco_val2014_questions.json, mscoco_val2014_annotations.json, val2014/
    VizWiz   val.json, a list of {image, question, answers, answerable}; val/
    TextVQA  textvqa_val_questions.json and _annotations.json in VQAv2's form, or TextVQA_0.5.1_val.json;
             train_images/

Whether TextVQA's prompt shows OCR tokens moves its figure by points: here it never does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from umm_jax.conversation import Image
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Response, Task, means, user
from umm_jax.evaluate.measures import vqa
from umm_jax.evaluate.source import Source, take

PROMPTS = {
    "short": "{question}\nAnswer the question using a single word or phrase.",
    "mm_interleaved": (
        "Based on the image, please answer the question. {question} Please provide an accurate answer within "
        "one word. The answer is:"
    ),
}
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


@dataclass(frozen=True)
class Settings:
    """What is asked.

    Attributes:
        split: of the release; answers of test splits are not published.
        prompt: the words around a question, see PROMPTS.
        extraction: "released" cuts replies as MM-Interleaved's release does, see
            ``measures.vqa.released_extraction``; for comparing with its figures alone.
    """

    split: str = "val"
    prompt: Literal["short", "mm_interleaved"] = "short"
    extraction: Literal["none", "released"] = "none"


def _asked(question: str, settings: Settings, hint: str = "") -> str:
    words = PROMPTS[settings.prompt].replace("{question}", question)
    return f"{words}\n{hint}" if hint else words


def _answers(entry: Any, of: str) -> list[str]:
    answers = [take(a, "answer", of, str) for a in take(entry, "answers", of, list)]
    if not answers:
        raise DataError(f"{of}: a question has no answer; those of test splits are not published")
    return answers


def _official(
    questions: str, annotations: str, pictures: str, numbers: type = int
) -> Callable[[Source, Settings], Iterator[Doc]]:
    """Docs of a release in VQAv2's two files; names hold {split}, pictures' {image} is of type `numbers`."""

    def docs(source: Source, settings: Settings) -> Iterator[Doc]:
        name = questions.format(split=settings.split)
        entries = take(source.json(name), "questions", name, list)
        asked = {take(q, "question_id", name, (int, str)): q for q in entries}
        name = annotations.format(split=settings.split)
        for entry in take(source.json(name), "annotations", name, list):
            id = take(entry, "question_id", name, (int, str))
            question = take(asked, id, questions.format(split=settings.split))
            yield _doc(
                str(id),
                take(question, "question", name, str),
                source.picture(
                    pictures.format(split=settings.split, image=take(entry, "image_id", name, numbers))
                ),
                _answers(entry, name),
                settings,
                {k: entry[k] for k in ("answer_type", "question_type") if k in entry},
            )

    return docs


def _doc(id: str, question: str, picture, answers: list[str], settings, group=None, hint: str = "") -> Doc:
    turns = (user(Image("image"), _asked(question, settings, hint)),)
    return Doc(id, turns, {"image": picture}, target=answers, group=group or {})


def _vizwiz(source: Source, settings: Settings) -> Iterator[Doc]:
    name = f"{settings.split}.json"
    entries = source.json(name)
    if not isinstance(entries, list):
        raise DataError(f"{name}: must be a list of questions")
    for entry in entries:
        image = take(entry, "image", name, str)
        answers = _answers(entry, name)
        picture = source.picture(f"{settings.split}/{image}", image)
        question = take(entry, "question", name, str)
        group = {"answer_type": entry["answer_type"]} if "answer_type" in entry else {}
        yield _doc(image, question, picture, answers, settings, group, UNANSWERABLE)


def _textvqa(source: Source, settings: Settings) -> Iterator[Doc]:
    if (source.root / f"textvqa_{settings.split}_annotations.json").exists():
        names = "textvqa_{split}_questions.json", "textvqa_{split}_annotations.json"
        yield from _official(*names, "train_images/{image}.jpg", str)(source, settings)
        return
    name = f"TextVQA_0.5.1_{settings.split}.json"
    for entry in take(source.json(name), "data", name, list):
        yield _doc(
            str(take(entry, "question_id", name)),
            take(entry, "question", name, str),
            source.picture(f"train_images/{take(entry, 'image_id', name)}.jpg"),
            _texts(entry, name),
            settings,
        )


def _texts(entry: Any, of: str) -> list[str]:
    return _answers({"answers": [{"answer": text} for text in take(entry, "answers", of, list)]}, of)


def _marked(accuracy: Callable[[str, list[str]], float]) -> Callable[[Doc, Response, Any], Marks]:
    def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
        text = response.text
        if settings.extraction == "released":
            text = vqa.released_extraction(text)
        return Marks({"accuracy": accuracy(text, doc.target)}, "" if text.strip() else "empty")

    return mark


def _task(name: str, docs, accuracy, files: str, hint: str = "") -> Task:
    return Task(
        name,
        docs,
        _marked(accuracy),
        "accuracy",
        means("accuracy", by=("answer_type", "question_type")),
        Settings,
        files=files,
        reply={"mode": "text", "max_tokens": 16},
        prompt=str(PROMPTS) + hint,
        post=accuracy.__name__,
    )


_VQA = "questions and annotations are published at visualqa.org, pictures at cocodataset.org"
TASKS = [
    _task(
        "vqav2",
        _official(
            "v2_OpenEnded_mscoco_{split}2014_questions.json",
            "v2_mscoco_{split}2014_annotations.json",
            "{split}2014/COCO_{split}2014_{image:012d}.jpg",
        ),
        vqa.vqa_accuracy,
        _VQA,
    ),
    _task(
        "okvqa",
        _official(
            "OpenEnded_mscoco_{split}2014_questions.json",
            "mscoco_{split}2014_annotations.json",
            "{split}2014/COCO_{split}2014_{image:012d}.jpg",
        ),
        vqa.vqa_accuracy,
        "questions and annotations are published at okvqa.allenai.org, pictures at cocodataset.org",
    ),
    _task("vizwiz", _vizwiz, vqa.vizwiz_accuracy, "published at vizwiz.org", UNANSWERABLE),
    _task("textvqa", _textvqa, vqa.textvqa_accuracy, "published at textvqa.org"),
]
