"""What all groups of commands are made with: a parser whose complaints help, and types of arguments."""

import argparse
import json
import os
import re
from collections.abc import Callable, Sequence

from umm_jax.config import suggest
from umm_jax.errors import ConfigError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says an argument's default where its text does not, and there is one."""

    def _get_help_string(self, action):
        silent = action.default is False or action.default in (None, "", [])
        if silent or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors: one line, with the nearest name where one was misspelt."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str):
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            choices = re.findall(r"[\w-]+", wrong[2])
            raise ConfigError(f"{self.prog}: {wrong[1]!r} is unknown{suggest(wrong[1], choices)}")
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")


def command(into, name: str, run: Callable, text: str, *, overridable: bool = False) -> Parser:
    """A command of the group `into`: `run(args)` does it; `overridable` takes --config.a.b=VALUE too."""
    made = into.add_parser(name, help=text, description=text)
    made.set_defaults(run=run, overridable=overridable, parser=made)
    if overridable:
        made.epilog = "Any value of the config is set with --config.a.b=VALUE."
    return made


def positive(text: str) -> int:
    """A type of arguments."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """A type of arguments."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """A type of arguments; 0 is any free one."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


def size(text: str) -> int:
    """A type of arguments: bytes, as "5GB" or "512 MiB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)(i?)B?", text, re.IGNORECASE)
    found_size = found and float(found[1]) * (1024 if found[3] else 1000) ** " kmg".index(
        found[2].lower() or " "
    )
    if not found_size or found_size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, got {text!r}")
    return int(found_size)


def set_values(texts: Sequence[str]) -> dict:
    """The values of --set KEY=VALUE; JSON, or a bare string where it is not."""
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text}: expected KEY=VALUE")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def shows_colour(stream) -> bool:
    """Whether `stream` is a terminal that says it can show 24-bit colour, and the user did not opt out."""
    if not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return os.environ.get("COLORTERM", "") in ("truecolor", "24bit") or "direct" in os.environ["TERM"]
