"""Captions: COCO (Karpathy's test split), nocaps, Flickr30k and paragraphs of Visual Genome.

    coco-caption     coco_karpathy_test.json, a list of {image: "val2014/COCO_val2014_000000391895.jpg",
                     caption: [...]}, and coco_karpathy_test_gt.json in COCO's form; val2014/
    nocaps           nocaps_val_4500_captions.json in COCO's form, whose images may have a domain; images/
    flickr30k        test1k.token.coco_format in COCO's form; flickr30k-images/
    image2paragraph  paragraphs_coco.json in COCO's form, whose annotations have a url, or paragraphs_v1.json,
                     a list of {image_id, url, paragraph}; test_split.json, a list of ids; images/VG_100K/ and
                     images/VG_100K_2/

COCO's form is {images: [{id, file_name}], annotations: [{image_id, caption}]}. Annotations may lie in
annotations/. Figures are in percent: a CIDEr of 138 is the evaluator's 1.38.

CIDEr weighs words by how many of the scored pictures have them in their references. With --limit, --partial
or docs that failed it is of those pictures alone, and so are its weights: not to be set beside that of all.
Figures by nocaps' domain are of each domain alone, weights included, as public scripts make them.

What finds the words is told in each figure's reason: the evaluator's tokenizer needs Java, see
``measures.ptb``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from umm_jax.conversation import Image, Text
from umm_jax.errors import DataError
from umm_jax.evaluate.contract import Doc, Marks, Record, Response, Score, Task, of_values, user
from umm_jax.evaluate.measures import captions, groups
from umm_jax.evaluate.source import Source, take

PROMPTS = {
    "sentence": "Provide a one-sentence caption for the provided image.",
    "photo": "a photo of",
    "paragraph": "Please describe the image in detail.",
    "depicts": "The image depicts",
}


@dataclass(frozen=True)
class Settings:
    """What is asked, and how it is scored.

    Attributes:
        split: of the release.
        prompt: the words beside the picture, see PROMPTS; "photo" and "depicts" are MM-Interleaved's, which
            the reply goes on with.
        first_sentence: cuts replies at their first point, as MM-Interleaved does for COCO.
        tokenizer: "java" is the evaluator's, "python" ours, "auto" the first where there is a Java.
        meteor: also METEOR, which needs Java. spice: also SPICE, which needs Java and a parser's models.
    """

    split: Literal["test", "val"] = "test"
    prompt: Literal["sentence", "photo", "paragraph", "depicts"] = "sentence"
    first_sentence: bool = False
    tokenizer: Literal["auto", "java", "python"] = "auto"
    meteor: bool = False
    spice: bool = False


@dataclass(frozen=True)
class ParagraphSettings(Settings):
    """As of the other captions; a paragraph is asked for."""

    prompt: Literal["sentence", "photo", "paragraph", "depicts"] = "paragraph"


@dataclass(frozen=True)
class ValSettings(Settings):
    """As of the other captions; only the captions of val are published."""

    split: Literal["val"] = "val"


@dataclass(frozen=True)
class TestSettings(Settings):
    """As of the other captions; the one split there is."""

    split: Literal["test"] = "test"


# --- docs ---------------------------------------------------------------------------------------------


def _annotations(source: Source, *names: str) -> tuple[str, Any]:
    """(name, content) of the first of these files that is there, in annotations/ or beside it."""
    tried = [place + name for name in names for place in ("", "annotations/")]
    return source.path(*tried).name, source.json(*tried)


def _list(content: Any, name: str) -> list:
    if not isinstance(content, list):
        raise DataError(f"{name}: is no list, as the release's is")
    return content


def _references(content: Any, name: str) -> dict[str, list[str]]:
    """{image id: captions} of a file in COCO's form."""
    found: dict[str, list[str]] = {}
    for entry in take(content, "annotations", name, list):
        found.setdefault(str(take(entry, "image_id", name)), []).append(take(entry, "caption", name, str))
    return found


def _doc(id: str, picture: Path, references: Mapping[str, list[str]], name: str, settings, group=None) -> Doc:
    if id not in references:
        raise DataError(f"{name}: no caption for the image {id!r}")
    turns = (user(Image("image"), Text(PROMPTS[settings.prompt])),)
    return Doc(id, turns, {"image": picture}, target=references[id], group=group or {})


def _karpathy(source: Source, settings: Settings) -> Iterator[Doc]:
    name, listed = _annotations(source, f"coco_karpathy_{settings.split}.json")
    of, truth = _annotations(source, f"coco_karpathy_{settings.split}_gt.json")
    references = _references(truth, of)
    for entry in _list(listed, name):
        image = take(entry, "image", name, str)
        number = image.rsplit("_", 1)[-1].split(".")[0]
        if not number.isdecimal():
            raise DataError(f"{name}: no number of a picture in {image!r}")
        yield _doc(str(int(number)), source.picture(image), references, of, settings)


def _coco_form(folder: str, *names: str) -> Callable[[Source, Settings], Iterator[Doc]]:
    """Docs of one file in COCO's form, pictures in `folder`; names hold {split}."""

    def docs(source: Source, settings: Settings) -> Iterator[Doc]:
        name, content = _annotations(source, *(n.format(split=settings.split) for n in names))
        references = _references(content, name)
        for image in take(content, "images", name, list):
            file = take(image, "file_name", name, str)
            group = {"domain": str(image["domain"])} if image.get("domain") else {}
            picture = source.picture(f"{folder}/{file}", file)
            yield _doc(str(take(image, "id", name)), picture, references, name, settings, group)

    return docs


def _paragraphs(source: Source, settings: Settings) -> Iterator[Doc]:
    name, content = _annotations(source, "paragraphs_coco.json", "paragraphs_v1.json")
    key = "caption" if isinstance(content, dict) else "paragraph"
    entries = take(content, "annotations", name, list) if isinstance(content, dict) else _list(content, name)
    references: dict[str, list[str]] = {}
    pictures: dict[str, Path] = {}
    # A picture may have several paragraphs: the evaluator takes them all as references.
    for entry in entries:
        id = str(take(entry, "image_id", name))
        references.setdefault(id, []).append(take(entry, key, name, str))
        file = "/".join(take(entry, "url", name, str).split("/")[-2:])
        pictures[id] = source.picture(f"images/{file}", file)
    split, ids = _annotations(source, f"{settings.split}_split.json")
    ids = [str(id) for id in _list(ids, split)]
    if missing := [id for id in ids if id not in references]:
        raise DataError(
            f"{name}: no paragraph for {len(missing)} images of {split} ({', '.join(missing[:3])})"
        )
    for id in ids:
        yield _doc(id, pictures[id], references, name, settings)


# --- marks and figures --------------------------------------------------------------------------------


def mark(doc: Doc, response: Response, settings: Settings) -> Marks:
    """The caption that is compared; what it is worth is known when all are there."""
    text = response.text.strip()
    if settings.first_sentence:
        text = text.split(".")[0]
    return Marks({}, "" if text.strip() else "empty", {"caption": text})


def _compared(records: Iterable[Record]) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    return tuple((r.doc.id, r.marks.parts["caption"], tuple(r.doc.target)) for r in records)


@lru_cache(maxsize=1)  # `total` and `units` want the same, which takes a while
def _words(compared: tuple[tuple[str, str, tuple[str, ...]], ...], tokenizer) -> captions.Words:
    hypotheses = {id: text for id, text, _ in compared}
    return captions.in_words(hypotheses, {id: refs for id, _, refs in compared}, tokenizer)


@lru_cache(maxsize=1)
def _ciders(compared: tuple[tuple[str, str, tuple[str, ...]], ...], tokenizer) -> dict[str, float]:
    return captions.cider(_words(compared, tokenizer))


def _score(records: Sequence[Record], by: str, measure: Callable, *args: Any) -> Score:
    """A figure of captions: a number of all of them, or numbers of each whose mean it is."""
    n, invalid = len(records), sum(bool(r.marks.invalid) for r in records)
    try:
        found = measure(*args)
    except captions.Unavailable as error:
        return Score(None, n=n, n_invalid=invalid, reason=str(error))
    if isinstance(found, Mapping):
        found = of_values(list(found.values()), 100, invalid)
        return Score(found.value, found.stderr, n, invalid, by)
    return Score(100 * found, None, n, invalid, by)


def total(records: Sequence[Record], settings: Settings) -> dict[str, Score]:
    """CIDEr, BLEU and ROUGE-L; METEOR and SPICE where they are wanted; CIDEr by domain."""
    wanted = [name for name in ("meteor", "spice") if getattr(settings, name)]
    if not records:
        names = ["cider", *(f"bleu_{k}" for k in (4, 3, 2, 1)), "rouge_l", *wanted]
        return {name: Score(None, reason="no captions") for name in names}
    compared = _compared(records)
    words = _words(compared, settings.tokenizer)
    by = f"words by {words.by}"
    found = {"cider": _score(records, by, _ciders, compared, settings.tokenizer)}
    bleu = captions.bleu(words)
    for k in (4, 3, 2, 1):
        found[f"bleu_{k}"] = _score(records, by, lambda value: value, bleu[k - 1])
    found["rouge_l"] = _score(records, by, captions.rouge_l, words)
    for name in wanted:
        found[name] = _score(records, by, getattr(captions, name), words)
    domains = groups.together((r.doc.group["domain"], r) for r in records if "domain" in r.doc.group)
    for domain, members in sorted(domains.items()):
        part = words.of([r.doc.id for r in members])
        found[f"cider/domain={domain}"] = _score(members, by, captions.cider, part)
    return found


def units(records: Sequence[Record], settings: Settings) -> dict[str, float]:
    """{id: CIDEr} of each picture, 0..10; none where there is no CIDEr."""
    try:
        return _ciders(_compared(records), settings.tokenizer) if records else {}
    except captions.Unavailable:
        return {}


def noted(records: Sequence[Record], settings: Settings) -> dict[str, str]:
    """Whose words figures are of: with Java the evaluator's own, else ours."""
    return {"words": _words(_compared(records), settings.tokenizer).by} if records else {}


def _task(name: str, docs, files: str, settings: type = Settings, tokens: int = 64) -> Task:
    return Task(
        name,
        docs,
        mark,
        "cider",
        total,
        settings,
        files=files,
        reply={"mode": "text", "max_tokens": tokens},
        prompt=str(PROMPTS),
        post="words of the Penn Treebank without punctuation, see the figures' reasons",
        scale=(0, 1000),
        units=units,
        noted=noted,
    )


TASKS = [
    _task(
        "coco-caption",
        _karpathy,
        "coco_karpathy_test.json and coco_karpathy_test_gt.json are published with BLIP, pictures at "
        "cocodataset.org",
    ),
    _task("nocaps", _coco_form("images", "nocaps_{split}_4500_captions.json"), "nocaps.org", ValSettings),
    _task(
        "flickr30k",
        _coco_form("flickr30k-images", "{split}1k.token.coco_format", "{split}1k.token.coco_format.json"),
        "pictures on request at shannon.cs.illinois.edu/DenotationGraph; captions of Karpathy's test split "
        "in COCO's form",
        TestSettings,
    ),
    _task(
        "image2paragraph",
        _paragraphs,
        "paragraphs_v1.json and test_split.json are published with 'A Hierarchical Approach for Generating "
        "Descriptive Image Paragraphs', pictures are Visual Genome's",
        ParagraphSettings,
        tokens=128,
    ),
]
