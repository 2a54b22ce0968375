"""The ``umm`` command: parse, load the config, call one function.

Nothing heavy is imported until a command runs. What the user can mend is one line on stderr and an exit
status of its own (see :mod:`umm_jax.errors`); anything else is a bug and keeps its traceback. A file of this
folder is a group of commands, its grammar and what it calls; ``grammar.py`` is what they share.
"""

import argparse
import errno
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from umm_jax.cli import convert, data, evaluate, launch, plan, route, runs
from umm_jax.cli.grammar import Parser, command
from umm_jax.config import suggest
from umm_jax.errors import ConfigError, StorageError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit status."""
    _leave_out_tpu()
    try:
        dispatch(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        return _complain(str(error), error.exit_status)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output left (`umm ... | head`); nothing more may be written to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        return _complain(f"{error.filename or 'output'}: {error.strerror}", StorageError.exit_status)
    return 0


def _leave_out_tpu() -> None:
    """Where libtpu was installed to plan with and there is no TPU, JAX need not look for one."""
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")) or "TPU_NAME" in os.environ:
        return
    on_gpu = any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if on_gpu else "cpu"


def dispatch(argv: Sequence[str]) -> None:
    """Parses and runs one command line; raises UserError."""
    args, extra = parser().parse_known_args(argv)
    overrides, rest = split_overrides(extra)
    if rest or (overrides and not args.overridable):
        odd = (rest or overrides)[0]
        known = [option for action in args.parser._actions for option in action.option_strings]
        hint = suggest(odd.partition("=")[0], known) if odd.startswith("-") else ""
        raise ConfigError(f"{args.parser.prog}: unknown argument {odd!r}{hint}")
    args.overrides = overrides
    args.run(args)


def split_overrides(extra: Sequence[str]) -> tuple[list[str], list[str]]:
    """Of the arguments argparse left over: config overrides, as "--config.a.b=value", and the rest.

    ``--config.a.b value`` is accepted too, as ml_collections does.
    """
    overrides, rest = [], []
    words = iter(extra)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
        elif "=" in word:
            overrides.append(word)
        else:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{word}: an override is written {word}=VALUE")
            overrides.append(f"{word}={value}")
    return overrides, rest


def _complain(message: str, status: int) -> int:
    print(f"umm: error: {' '.join(message.split())}", file=sys.stderr)
    return status


# --- the grammar of the command line ------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    top = Parser(prog="umm", description="Conversational unified multimodal models in JAX.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (data, runs, evaluate, plan, launch, convert, route):
        group.add(commands)
    command(commands, "version", _version, "Print the versions of umm_jax and of what it stands on.")
    return top


def _version(args) -> None:
    from umm_jax.versions import versions

    print("  ".join(f"{name} {number}" for name, number in versions().items()))
