"""``umm route``: what an answer asks experts to do."""

import json
import sys

from umm_jax.cli.grammar import command, port
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
    p.add_argument("--experts", action="store_true", help="run the calls, and write what they give to --out")
    expert_address(p)
    p.add_argument("--conversation", metavar="FILE", help="whose pictures, sent by the user, they work on")
    p.add_argument("--out", metavar="DIR", help="folder for results and manifest.json")
    p.add_argument("--seed", type=int, default=0, help="of what experts draw")
    p = command(commands, "experts", _experts, "List the experts that are installed, and what they do.")
    p.add_argument("--serve", metavar="NAME", help="answer for this one over HTTP, see --expert")
    p.add_argument("--host", default="127.0.0.1", help="with --serve (default: this machine only)")
    p.add_argument("--port", type=port, default=8400, help="with --serve (default: 8400)")


def expert_address(parser) -> None:
    """Adds --expert=URL."""
    parser.add_argument(
        "--expert",
        action="append",
        default=[],
        metavar="URL",
        help="an expert that answers over HTTP; asked before others; can be repeated",
    )


def add_remote(registry, urls) -> None:
    """Registers the experts at these addresses."""
    from umm_jax.router.remote import Remote

    for url in urls:
        registry.add(Remote(url))


def _route(args) -> None:
    from umm_jax.markup import dialects
    from umm_jax.markup.grammar import parse
    from umm_jax.markup.plan import plan
    from umm_jax.router.manifest import manifest

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
    if args.experts or args.expert:
        found = _run(args, answer)
    else:
        found = manifest(answer, plan(answer, args.media))
    if args.json:
        print(json.dumps(found, ensure_ascii=False))
        return
    print(found["text"])
    for k, call in enumerate(found["calls"]):
        if "status" in call:
            files = " ".join(output.get("file", "boxes") for output in call["outputs"])
            print(f"call {k}: {call['task']}: {call['status']} {files or call['note']}")
            continue
        takes = call["takes"] or call["missing"]
        print(f"call {k}: {call['task']}: {call['prompt']}" + (f" ({takes})" if takes else ""))
    for diagnostic in answer.diagnostics:
        print(f"{diagnostic.code} at {diagnostic.at} {diagnostic.detail}".rstrip(), file=sys.stderr)


def _run(args, answer) -> dict:
    """The manifest with what became of every call; also written to --out."""
    from pathlib import Path

    from umm_jax.conversation import Image
    from umm_jax.data.files import write_atomic
    from umm_jax.data.inspect import open_any
    from umm_jax.markup.plan import plan
    from umm_jax.router.execute import Executor
    from umm_jax.router.experts import Medium, Registry
    from umm_jax.router.manifest import manifest
    from umm_jax.router.saving import save

    if not args.out:
        raise ConfigError("--experts needs --out=DIR for what they give")
    if args.media:
        raise ConfigError("--media says what is not there; with --experts give --conversation=FILE")
    media = []
    if args.conversation:
        record = open_any(args.conversation)[0]
        for turn in record.turns:
            shown = [part for part in turn.parts if isinstance(part, Image)] if turn.role == "user" else []
            media += [Medium("image", record.images[part.ref].array()) for part in shown]
    steps = plan(answer, [medium.kind for medium in media])
    registry = Registry.installed()
    add_remote(registry, args.expert)
    executor = Executor(registry, strict=args.strict)
    done = save(executor.run(steps, media, args.seed), args.out)
    found = manifest(answer, steps)
    for call, facts in zip(found["calls"], done):
        call |= facts
    write_atomic(Path(args.out) / "manifest.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return found


def _experts(args) -> None:
    from umm_jax.router.experts import Registry

    registry = Registry.installed()
    if args.serve:
        return _serve(registry.get(args.serve), args.host, args.port)
    for name in registry.names:
        try:
            spec = registry.get(name).spec
        except ConfigError as error:
            print(f"{name:20} {error}")
            continue
        stands_in = "  stands in for a model" if spec.degraded else ""
        print(f"{name:20} {spec.version:8} {', '.join(sorted(spec.tasks))}{stands_in}")


def _serve(expert, host: str, port: int) -> None:
    from umm_jax.router.remote import server

    try:
        made = server(expert, host, port)
    except OSError as error:
        raise ConfigError(f"{host}:{port}: {error.strerror or error}") from None
    print(f"{expert.spec.name} at http://{host}:{made.server_port}; Ctrl-C ends it", flush=True)
    try:
        made.serve_forever()
    finally:
        made.server_close()
        expert.close()
