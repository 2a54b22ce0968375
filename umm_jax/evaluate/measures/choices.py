"""Which option a reply names: how the evaluators of MMBench and MMMU read it, and a strict reading beside.

An option is named by its letter. Where the evaluators draw one at random because they can read nothing, here
the answer is None: nobody's guess is counted. Odd corners are kept, since published figures came from them:

- MMBench's reader knows letters by being words of their own, so that of "A dog" and "I see A" it reads A;
- MMMU's takes every capital letter before a space for one, also the last of "USA ", and of "C. A girl" it
  reads A; if there are several, the one that stands last;
- its reader of open answers was to split sentences before capital letters, but does so after making all
  letters small: it splits at line breaks alone. A text answer is right wherever it is part of the reply.

Sources: VLMEvalKit's answer matching; the evaluation utilities of the MMMU benchmark.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

NONE_OF_THEM = "Z"  # how MMBench's reader says that a reply names no option on purpose
REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)

_LETTER = re.compile(r"^\W*([A-Za-z])(?:\W*$|[).:\]]+\s+\S)")
_AS_BLANKS = str.maketrans(".()[],:;!*#{}", " " * 13)
_SAID = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")


def strict_letter(reply: str, letters: Iterable[str]) -> str | None:
    """The letter of a reply that is a letter, or begins with one marked as such: "b", "(B)", "B. A dog".

    "A dog" names none: an article is no answer.
    """
    found = _LETTER.match(reply)
    letter = found.group(1).upper() if found else None
    return letter if letter in set(letters) else None


def why_none(reply: str, letter: str | None) -> str:
    """Words for ``Marks.invalid``: "" where a letter was read."""
    if not reply.strip():
        return "empty"
    return {None: "no option named", NONE_OF_THEM: "none of the options"}.get(letter, "")


# --- MMBench ------------------------------------------------------------------------------------------


def mmbench(reply: str, options: Mapping[str, str], *, recent: bool = True) -> str | None:
    """The option by its letter, else by its text; NONE_OF_THEM, or None where only a judge could tell.

    Args:
        options: {letter: text}.
        recent: as since mid-2025: the letter must be among the last four words, or follow "answer is"; and
            texts are looked for only in replies at most twice as long as all of them. Figures published
            before come from the other way: the letter anywhere, texts in replies of any length.
    """
    return _by_letter(reply, options, recent) or _by_text(reply, options, recent)


def _by_letter(reply: str, options: Mapping[str, str], recent: bool) -> str | None:
    if any(refusal in reply for refusal in REFUSALS):
        return NONE_OF_THEM
    words = reply.translate(_AS_BLANKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and (not recent or words.index(named[0]) > len(words) - 5):
        return named[0]
    if not named and NONE_OF_THEM in words:
        return NONE_OF_THEM
    said = _SAID.search(reply) if recent else None
    return said.group(1).upper() if said and said.group(1).upper() in options else None


def _by_text(reply: str, options: Mapping[str, str], recent: bool) -> str | None:
    reply = reply.lower()
    if recent and len(reply) > 2 * sum(len(text) for text in options.values()):
        return None
    found = [letter for letter, text in options.items() if text.lower() in reply]
    return found[0] if len(found) == 1 else None


# --- MMMU ---------------------------------------------------------------------------------------------


def mmmu_choice(reply: str, options: Mapping[str, str], *, first_release: bool = False) -> str | None:
    """The option MMMU's evaluator reads, None where it would draw one.

    Args:
        options: {letter: text}, in order.
        first_release: as of December 2023, which wanted a space on both sides of a bare letter.
    """
    for mark in ",.!?;:'":
        reply = reply.strip(mark)
    reply = f" {reply} "
    forms = ["({})", " {} "] if first_release else ["({})", "{} ", "{}."]
    for form in forms:
        if found := [letter for letter in options if form.format(letter) in reply]:
            looked_for = form if form == "({})" else " {} "
            return max(found, key=lambda letter: reply.rfind(looked_for.format(letter)))
    low = reply.lower()
    if len(low.split()) > 5:
        if found := [letter for letter, text in options.items() if text.lower() in low]:
            return max(found, key=lambda letter: low.rfind(options[letter].lower()))
    return None


_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # with commas
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # with a power of ten
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # plain
)
_BEFORE_ANSWERS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NO_ANSWERS = (":", ",", ".", "!", "?", ";", "'")


def mmmu_normalised(text: str) -> list[str | float]:
    """A number, rounded to two places; else the text in small letters, one letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_open(reply: str) -> list[str | float]:
    """What MMMU's evaluator takes for answers in a reply to an open question: pieces of text, and numbers."""
    reply = reply.strip().strip(".").lower()
    lines = reply.split("\n")
    pieces = []
    for at, line in enumerate(lines):
        shortest = ""
        for words in (*_BEFORE_ANSWERS, *(("=",) if at == len(lines) - 1 else ())):
            if words in line:
                tail = line.split(words)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _NO_ANSWERS:
            pieces.append(shortest)
    pieces = pieces or [reply]
    numbers = [n for piece in pieces for pattern in _NUMBERS for n in pattern.findall(piece)]
    return list(dict.fromkeys(one for text in (*pieces, *numbers) for one in mmmu_normalised(text)))


def mmmu_open_right(answers: Sequence[str], found: Sequence[str | float]) -> bool:
    """Whether a number found is an answer, or a text found holds one. `found`: see :func:`mmmu_open`."""
    right = [one for answer in answers for one in mmmu_normalised(answer)]
    texts = [one for one in right if isinstance(one, str)]
    return any(any(text in one for text in texts) if isinstance(one, str) else one in right for one in found)


def mmmu_open_same(answers: Sequence[str], reply: str) -> bool:
    """Whether the whole reply, but for a last full stop, is one of the answers."""
    said = mmmu_normalised(reply.strip().rstrip("."))
    return any(said == mmmu_normalised(answer) for answer in answers)
