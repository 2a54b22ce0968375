"""Words of captions after the Penn Treebank's rules, as the COCO caption evaluator wants them.

The evaluator runs the Stanford PTB tokenizer 3.4.1 (Java) with -lowerCase and takes its list of punctuation
out. :func:`java_words` runs that very program, which comes with the package pycocoevalcap;
:func:`python_words` is our own reading of the rules for machines without Java. Their words were compared on
30,000 lines of English prose of all sorts: one line in 800 differs, and those hold version numbers, file
names and the like; see :data:`KNOWN`. Our runs of the program end in a line break, the evaluator's do not,
which can cost its very last caption the point of a last letter.

Two things hold for both. The evaluator lists brackets in capitals, though they are in small letters by then:
"(" stays in a caption, as the word "-lrb-". And a text is made one line first: the evaluator does so with
"\\n" alone, but the program breaks lines elsewhere too (carriage return, U+2028), and then every later
caption would be taken for the one before it.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from umm_jax.data.entries import extra
from umm_jax.errors import DataError

# What python_words reads otherwise than the program.
KNOWN = ("python2.4-dev", "4.2.1-6", "(555) 123-4567", "&#39;", "c++11", "b c;d", "<< x >>", "wl,-z")
# The evaluator's list, to the letter.
PUNCTUATION = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
_JAR = "stanford-corenlp-3.4.1.jar"
# What str.splitlines() breaks at; the program breaks at most of these.
_BREAKS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ") | {0xAD: ""}

# Words that keep their point: always, with a capital alone, and before a number alone. Found by giving the
# program every word of up to four letters, and longer ones of English text.
_ABBREVIATIONS = """
adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr
co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov
govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj mar md messrs mich minn mlle mme mo
mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc pres prof pvt rd rep reps rev rt sen sens
sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu tue tues univ va vs vt wed wis wisc wm wyo mfg mtg
ppte ppty pte ptes pty ptys
""".split()
_CAPITAL = "ark az del ill la mass miss ore pa tex wash".split()
_BEFORE_NUMBER = "art ca fig figs no nos op pp prop".split()
# Words that begin a sentence, before which a single letter loses its point.
_STARTERS = """
A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once
One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
""".split()
# Words that are two.
_TWO = {"cannot": 3, "gonna": 3, "gotta": 3, "lemme": 3, "gimme": 3, "wanna": 3}
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "&nbsp;": " "}
# One mark for another: brackets and money as the treebank has them, dashes and quotes as the list has them.
_WRITTEN = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "£": "#",
    "€": "$",
    "¢": "cents",
    "…": "...",
    "–": "--",
    "—": "--",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
} | dict.fromkeys('"“”‘’`«»‹›', "'")


def _any(words: Sequence[str]) -> str:
    return "|".join(f"[{w[0]}{w[0].upper()}](?i:{w[1:]})" for w in words)


_L, _A, _Q = r"[^\W\d_]", r"[^\W_]", "['’]"
_NUMBER = r"(?:\d+(?:[.,:]\d+)*|(?:[.,:]\d+)+)"
# The first that matches is taken, so what is longer stands before what begins alike.
_RULES = (
    # Addresses, tags, names of users and topics.
    r"https?://[^\s<>\"|(){}]*[^\s<>\"|(){}.,;:!?'-]",
    r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+",
    r"</?[A-Za-z][^<>\n]*>",
    r"[#@][A-Za-z_]\w*",
    # Words with a point at their end: u.s.a., mr., no. 5, vitamin c.
    rf"(?<!\w)(?:[Pp]h\.[Dd]|{_L}(?:\.{_L})+)\.(?!\w)",
    rf"(?<!\w)(?:{_any(_ABBREVIATIONS)}|{'|'.join(w.capitalize() for w in _CAPITAL)})\.(?!{_L})",
    rf"(?<!\w)(?:{_any(_BEFORE_NUMBER)})\.(?=\s?\d)",
    rf"(?<!\w){_L}\.(?!{_L}|\.|\s+(?:{'|'.join(_STARTERS)})\b)",
    # And inside: x.com, end.Start, u.s.-based
    rf"(?<!\w){_L}{_A}*(?:\.{_L}{_A}*)+(?:\.?-{_A}+)*",
    # don't
    rf"{_L}+(?=[nN]{_Q}[tT](?!{_L}))|[nN]{_Q}[tT](?!{_L})",
    # 1/2, 3 1/2, and/or, w/o
    rf"(?:(?<![\w/])\d+[ -])?(?<!\w)\d{{1,4}}/\d{{1,4}}(?![\w/])|(?<!\w){_A}+(?:/{_A}+)+",
    # AT&T, c++, US$
    r"(?<!\w)(?:[A-Z]+&[A-Z]+(?!\w)|[Cc](?:\+\+|#)(?!\w)|[A-Z]{1,2}\$)",
    # :-)
    r"[<>]?[:;=]['-]?[()DPp\[\]{}|\\](?!\w)",
    # Apostrophes that are part of a word: o'brien, y'all, hawai'i, o'clock
    rf"[dDoOlL]{_Q}{_L}{{2,}}|(?<!\w)(?:[dDjJlL]{_Q}|[yY]{_Q}(?={_L}))",
    rf"{_L}*[aeiouyAEIOUY]{_Q}[aeiouAEIOU]{_L}*",
    rf"(?<!\w)(?i:o{_Q}clock|ma{_Q}am|c{_Q}mon|(?:ne|o|e){_Q}er|cap{_Q}n|(?:ol|dunkin|somethin){_Q})(?!\w)",
    # t-shirt, 3-year-old, 3d, a_b
    rf"{_A}+(?:[-_]{_A}+)+|\d+{_L}{_A}*|{_L}{_A}*",
    # 2.x, -5, 10:30
    rf"(?<!\w)\d+(?:\.\d+)*\.[xX](?!\w)|[+-]?{_NUMBER}",
    # Apostrophes that begin a word: 's, '90s, 'n', 'em
    rf"{_Q}(?i:s|m|d|re|ve|ll)(?!{_L})|(?<!\w){_Q}\d\ds?(?!\w)|{_Q}n{_Q}",
    rf"{_Q}(?i:em|cause|till?|n)(?!{_L})|{_Q}[tT](?=is\b|was\b)",
    r"&(?:amp|lt|gt|quot|apos|nbsp);",
    r"\.{3,}|-{2,}|\*+|[!?]+|_+|#+",
    # What is not seen, and what Java holds in two halves and cannot read, are left out.
    r"[^\s\x00-\x1f\x7f\u200b-\u200f\ufe0f\ufeff\ud800-\udfff\U00010000-\U0010ffff]",
)
_TOKEN = re.compile("|".join(_RULES))


def one_line(text: str) -> str:
    """`text` with every line break a space, and without soft hyphens."""
    return text.translate(_BREAKS)


def python_words(text: str) -> list[str]:
    """Words of one caption, without punctuation; our own reading of the rules."""
    return [word for match in _TOKEN.finditer(one_line(text)) for word in _read(match.group())]


def _read(token: str) -> list[str]:
    """The words a token stands for: one, two, or none where it is punctuation."""
    token = _ENTITIES.get(token, token)
    word = _WRITTEN.get(token, token).lower()
    if token[0] == "’" or token[-2:].lower() == "’t":
        word = word.replace("’", "'")
    elif token[:2] in ("..", "--"):
        word = "..." if token[0] == "." else "--"
    elif len(token) > 1 and token[0] in ":;=":
        word = "".join(_WRITTEN[mark] if mark in "()[]{}" else mark for mark in word)
    elif len(token) > 1 and (token[0] == "<" or "/" in token):
        word = word.replace(" ", "\u00a0")  # a tag, or "3 1/2", is one word
    parts = (word[: _TWO[word]], word[_TWO[word] :]) if word in _TWO else (word,)
    return [part for part in parts if part not in PUNCTUATION]


def has_java() -> bool:
    """Whether there is a Java to run the evaluator's program with."""
    return shutil.which("java") is not None


def java_words(texts: Sequence[str]) -> list[list[str]]:
    """Words of each caption, without punctuation, by the evaluator's own program.

    Raises:
        ConfigError: the package is missing. DataError: Java is, or it failed.
    """
    package = extra("pycocoevalcap.tokenizer.ptbtokenizer", "captions", "pycocoevalcap", "eval")
    jar = Path(package.__file__).with_name(_JAR)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.txt"
        path.write_text("".join(one_line(text) + "\n" for text in texts), "utf-8", "replace")
        command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        try:
            done = subprocess.run([*command, "-preserveLines", "-lowerCase", str(path)], capture_output=True)
        except OSError as error:
            raise DataError(f"the captions' tokenizer needs Java: {error.strerror or error}") from None
    lines = done.stdout.decode("utf-8", "replace").split("\n")
    # One line a caption, and what follows the last line break.
    if done.returncode or len(lines) != len(texts) + 1:
        told = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise DataError(
            f"the captions' tokenizer failed: {len(lines) - 1} lines for {len(texts)} captions"
            f"{': ' + told[-1] if told else ''}"
        )
    return [[word for word in line.split(" ") if word and word not in PUNCTUATION] for line in lines[:-1]]
