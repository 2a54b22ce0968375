"""``umm route``: what an answer asks experts to do."""

import json
import sys

from umm_jax.cli.grammar import command
from umm_jax.errors import ConfigError

MOST = 1 << 20  # characters of an answer


def add(commands) -> None:
    """Adds the command."""
    p = command(commands, "route", _route, "Read an answer on standard input: its words, places and calls.")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--dialect", default="umm1", help="how the answer is spelt (default: umm1)")
    p.add_argument("--strict", action="store_true", help="keep no call in which something is wrong")
    p.add_argument("--max-calls", type=int, default=8, help="calls beyond are left out (default: 8)")
    p.add_argument(
        "--media",
        action="append",
        default=[],
        choices=["image", "video", "audio"],
        help="what the user sent, in order; can be repeated",
    )


def _route(args) -> None:
    from umm_jax.router import dialects
    from umm_jax.router.grammar import parse
    from umm_jax.router.manifest import manifest
    from umm_jax.router.plan import plan

    dialect = dialects.get(args.dialect)
    if args.max_calls < 0:
        raise ConfigError(f"--max-calls must not be negative, it is {args.max_calls}")
    read = sys.stdin.buffer.read(4 * MOST + 1)
    try:
        text = read.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text: {error}") from None
    if len(text) > MOST:
        raise ConfigError(f"an answer of more than {MOST} characters")
    answer = parse(text, dialect, mode="strict" if args.strict else "lenient", max_calls=args.max_calls)
    found = manifest(answer, plan(answer, args.media))
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(found["text"])
    for k, call in enumerate(found["calls"]):
        takes = call["takes"] or call["missing"]
        print(f"call {k}: {call['task']}: {call['prompt']}" + (f" ({takes})" if takes else ""))
    for diagnostic in answer.diagnostics:
        print(f"{diagnostic.code} at {diagnostic.at} {diagnostic.detail}".rstrip(), file=sys.stderr)
