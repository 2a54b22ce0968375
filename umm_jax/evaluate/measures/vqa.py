"""Answers of visual question answering: the official normalisers, and soft accuracy over human answers.

The evaluators of VQAv2, VizWiz and TextVQA share their steps and differ in when they apply them; all three
are kept to the letter, odd corners included, because published figures came from them:

- a mark of punctuation is deleted where it stands beside a space anywhere in the text (or where the text has
  a comma between digits), else it becomes a space;
- the pattern that was to keep decimal points is malformed, so it keeps a point only before a digit; and at
  most 32 points are removed, since a flag was passed where `re.sub` takes a count.

Sources: VQAEval of the VQA evaluation tools, its VizWiz variant, and the EvalAI answer processor of TextVQA.
"""

import re
from collections.abc import Sequence

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`")
PUNCTUATION += (",", "?", "!")
ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(n) for n, word in enumerate(NUMBERS)} | {"none": "0"}
# As the evaluators have them: some keys can never match, since words are in small letters by then.
CONTRACTIONS = dict(
    pair.split(":")
    for pair in """
    aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've
    couldnt've:couldn't've didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've
    hadn'tve:hadn't've hasnt:hasn't havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's
    howd:how'd howll:how'll hows:how's Id've:I'd've I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd
    itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't
    mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
    neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at
    'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've
    shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd
    somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll
    somebodys:somebody's someoned:someone'd someoned've:someone'd've someone'dve:someone'd've
    someonell:someone'll someones:someone's somethingd:something'd somethingd've:something'd've
    something'dve:something'd've somethingll:something'll thats:that's thered:there'd
    thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd
    theyd've:they'd've they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas
    wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't whatll:what'll
    whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's
    whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
    whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
    wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll
    yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
    you'dve:you'd've youll:you'll youre:you're youve:you've
""".split()
)
# The VizWiz evaluator writes typographic apostrophes, but in these.
_STRAIGHT = ("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove")
_STRAIGHT_KEYS = ("couldn'tve", "hadn'tve")
CURLY = {
    k if k in _STRAIGHT_KEYS else k.replace("'", "’"): v if k in _STRAIGHT else v.replace("'", "’")
    for k, v in CONTRACTIONS.items()
}

_POINT = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"\d,\d")
_MOST_POINTS = int(re.UNICODE)


def without_punctuation(text: str) -> str:
    """`text` without its marks, as all three evaluators do it."""
    glued = _COMMA.search(text) is not None
    found = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space or glued else " ")
    return _POINT.sub("", found, count=_MOST_POINTS)


def in_plain_words(text: str, contractions: dict[str, str] = CONTRACTIONS) -> str:
    """In small letters, numbers up to ten in digits, without articles, apostrophes put back."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def _trimmed(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _share(prediction: str, answers: Sequence[str]) -> float:
    """mean over i of min(1, |{j != i : a_j = p}| / 3): each answer is left out once."""
    same = [answer == prediction for answer in answers]
    total = sum(same)
    return sum(min(1.0, (total - one) / 3) for one in same) / len(answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of VQAv2 and OK-VQA, 0..1.

    Texts are normalised only where the answers differ from one another, so where all ten agree a prediction
    has to match them letter by letter.
    """
    prediction, answers = _trimmed(prediction), [_trimmed(a) for a in answers]
    if len(set(answers)) > 1:
        prediction, *answers = (in_plain_words(without_punctuation(t)) for t in (prediction, *answers))
    return _share(prediction, answers)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of VizWiz, 0..1: the prediction is always normalised, the answers never are."""
    return _share(in_plain_words(without_punctuation(_trimmed(prediction)), CURLY), answers)


def evalai(text: str) -> str:
    """The answer processor of TextVQA's challenge."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return in_plain_words(without_punctuation(_trimmed(text)))


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Soft accuracy of TextVQA, 0..1: both sides go through :func:`evalai`, always."""
    return _share(evalai(prediction), [evalai(answer) for answer in answers])


def released_extraction(text: str) -> str:
    """What MM-Interleaved's release makes of a reply before it is scored; for `compat` alone.

    It cuts after the first "is ", "are ", "a ", "an " and "the " in turn, which also end other words: of
    "pizza with cheese" it leaves "with cheese".
    """
    text = re.split(r"[\n.,!]", text.replace('"', "").strip(), maxsplit=1)[0].lower()
    for before in ("is ", "are ", "a ", "an ", "the "):
        if before in text:
            text = text.split(before)[1]
    for after in (" of", " or ", " and "):
        text = text.split(after)[0]
    return text.strip()
