"""``umm data``: making, importing and looking at conversations on disk."""

import argparse
import shlex
import sys
from pathlib import Path

from umm_jax.cli.grammar import command, positive, set_values, shows_colour
from umm_jax.errors import ConfigError


def add(commands) -> None:
    """Adds the commands of this group."""
    data = commands.add_parser("data", help="write and look at conversations on disk")
    of_data = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    def of_the_world(name: str, run, text: str) -> argparse.ArgumentParser:
        made = command(of_data, name, run, text, overridable=True)
        made.add_argument("--config", help="take the world, and how much of it, from this config")
        made.add_argument("--preset", help="world preset (default: tiny, or that of the config)")
        made.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change one value of the preset; with --from, of data.synthesis.stages.Stages",
        )
        return made

    p = of_the_world(
        "synthesize", _synthesize, "Write conversations of the world, or made of other records, as shards."
    )
    p.add_argument(
        "--from",
        dest="folders",
        action="append",
        default=[],
        metavar="FOLDER",
        help="compose dialogues from the records of this folder, in stages; can be repeated",
    )
    p.add_argument("--stages", help="with --from: which stages, such as 1,2 (default: 1,2,3)")
    p.add_argument(
        "--rewriter",
        choices=["template", "openai", "replay"],
        help="with --from: who words questions anew (default: template, which nobody does)",
    )
    p.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible API, for --rewriter=openai")
    p.add_argument("--model", default="", help="as the endpoint calls it")
    p.add_argument("--key", default="", metavar="NAME", help="environment variable that holds its key")
    p.add_argument("--cache", metavar="FOLDER", help="replies of the endpoint (default: OUT.cache)")
    p.add_argument("--budget", type=int, default=0, help="requests of each worker at most; 0 is no limit")
    p.add_argument("--count", type=positive, help="number of conversations (default: one for each record)")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--seed", type=int, help="another seed, other conversations (default: 0, or the config's)")
    p.add_argument("--split", default="train", help="which scenes may appear")
    _of_shards(p, 4)

    p = of_the_world(
        "tokenizer", _tokenizer, "Train a tokenizer: of every word of the world, or on your data."
    )
    p.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="PATH",
        help="train on the texts of these records instead",
    )
    p.add_argument("--limit", type=positive, default=100_000, help="records of a path to read at most")
    p.add_argument("--out", required=True, help="file to write, for example runs/demo/tokenizer.model")
    p.add_argument(
        "--family", default="mm_interleaved", help="whose control pieces to add where there is no --config"
    )
    p.add_argument(
        "--vocab", type=positive, help="largest number of pieces (default: 1024, or what the model can hold)"
    )

    p = command(of_data, "import", _import, "Bring a public data set into ArrayRecord shards.")
    p.add_argument("kind", metavar="FORMAT", help="which data set; `umm data formats` lists them")
    p.add_argument("annotations", metavar="SRC", help="an annotation file, or a folder of them")
    p.add_argument("--images", help="folder the names of pictures start from")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting of the importer"
    )
    p.add_argument("--seed", type=int, default=0, help="of what is drawn: another seed, other choices")
    p.add_argument(
        "--max-rejected",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of records, and of pictures, that may be broken before the import fails (default: 0.05)",
    )
    p.add_argument("--max-pixels", type=positive, help="of a picture (default: 64 million)")
    p.add_argument("--max-bytes", type=positive, help="of an encoded picture (default: 20 MiB)")
    p.add_argument("--source", default="", help="name of the source in the records (default: the kind)")
    p.add_argument("--license", default="", help="terms the records may be used under")
    p.add_argument("--split", default="train", help="name of the split")
    _of_shards(p, 8)

    p = command(of_data, "tasks", _tasks, "Write records again with a call before whatever is shown.")
    p.add_argument("path", metavar="FOLDER", help="a finished folder")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument(
        "--chain",
        default="1,1",
        metavar="LEAST,MOST",
        help="requests of a turn (default: 1,1)",
    )
    p.add_argument("--seed", type=int, default=0, help="of how many are joined")
    _of_shards(p, 8)

    command(of_data, "formats", _formats, "List what import reads.")

    p = command(of_data, "inspect", _inspect, "Show conversations of a shard, a folder or a JSON file.")
    p.add_argument("path", help="a folder of shards, one of them, or a .json, .jsonl or .msgpack file")
    p.add_argument("--index", type=int, default=0, help="first conversation to show")
    p.add_argument("--count", type=positive, default=1, help="how many to show")
    p.add_argument("--images", metavar="FOLDER", help="write their pictures there")
    p.add_argument("--html", metavar="FILE", help="write them as a page instead")

    p = command(of_data, "report", _report, "Write what a folder holds as a page of figures.")
    p.add_argument("path", help="a finished folder")
    p.add_argument("--out", help="folder for report.json and report.html (default: PATH.report)")
    p.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="FOLDER",
        help="look for the same pictures and words here, in an evaluation set say; can be repeated",
    )
    p.add_argument("--limit", type=positive, default=20_000, help="records to read at most")

    p = command(of_data, "stats", _stats, "Count what a folder of shards holds.", overridable=True)
    p.add_argument("path", help="whatever inspect opens")
    p.add_argument("--config", help="say too how full the rows are that this config makes of it")
    p.add_argument("--tokenizer", metavar="FILE", help="count text tokens too")
    p.add_argument("--limit", type=positive, default=2000, help="conversations to read at most")


def _of_shards(p: argparse.ArgumentParser, shards: int) -> None:
    """How many files, and who writes them: the bytes do not depend on who."""
    p.add_argument("--shards", type=positive, default=shards, help="number of files")
    p.add_argument("--workers", type=int, default=1, help="processes that write them")
    p.add_argument(
        "--beam",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="write them with an Apache Beam pipeline of these options: --beam='--runner=FlinkRunner ...'",
    )


def _world(args):
    """The RunConfig of --config, or None, and the WorldConfig of it, --preset and --set."""
    from umm_jax import config
    from umm_jax.world.scene import WorldConfig

    run = config.load(args.config, args.overrides) if args.config else None
    if args.overrides and not run:
        raise ConfigError(f"{args.overrides[0]}: there is no config to override; add --config=FILE")
    values = dict(run.world.overrides) if run and args.preset in (None, run.world.preset) else {}
    values |= set_values(args.set)
    return run, WorldConfig.preset(args.preset or (run.world.preset if run else "tiny"), **values)


def _synthesize(args) -> None:
    import functools

    from umm_jax.config import to_dict
    from umm_jax.world.dialogue import VERSION

    if args.folders:
        return _compose(args)
    for name in ("stages", "rewriter", "endpoint", "model", "key", "cache", "budget"):
        if getattr(args, name) not in (None, "", 0):
            raise ConfigError(f"--{name} is of --from=FOLDER, which composes other records")
    run, world = _world(args)
    count = args.count or (run and run.world.count)
    if not count:
        raise ConfigError("how many conversations? --count=N, or --config=FILE which says so")
    seed = args.seed if args.seed is not None else run.train.seed if run else 0
    how = {"source": "world", "version": VERSION, "world": to_dict(world), "seed": seed}
    how["split"] = args.split
    make = functools.partial(_nth_dialogue, world, seed, args.split)
    _make(args, make, count, how, "synthesize")


def _compose(args) -> None:
    from umm_jax.config import from_dict
    from umm_jax.data.synthesis import rewriters
    from umm_jax.data.synthesis.stages import Stages
    from umm_jax.data.synthesis.synthesizer import Synthesizer

    if args.config or args.preset or args.overrides:
        raise ConfigError("--config, --preset and overrides are of the world; --from composes other records")
    try:
        stages = [int(stage) for stage in (args.stages or "1,2,3").split(",")]
    except ValueError:
        raise ConfigError(f"--stages is a list such as 1,2,3, got {args.stages!r}") from None
    settings = from_dict(Stages, {"stages": stages, **set_values(args.set)}, "stages")
    rewriter = None
    if args.rewriter not in (None, "template"):
        if not args.model or (args.rewriter == "openai" and not args.endpoint):
            raise ConfigError(f"--rewriter={args.rewriter} needs --endpoint=URL and --model=NAME")
        # What is only replayed is asked of nobody.
        url = args.endpoint or "http://nobody.invalid"
        endpoint = rewriters.Endpoint(url, args.model, args.key, budget=args.budget)
        kind = rewriters.OpenAIRewriter if args.rewriter == "openai" else rewriters.ReplayRewriter
        rewriter = kind(endpoint, rewriters.Cache(args.cache or f"{args.out.rstrip('/')}.cache"))
    make = Synthesizer(args.folders, settings, rewriter=rewriter, seed=args.seed or 0, split=args.split)
    _make(args, make, args.count or len(make), make.recipe(), "synthesize")


def _make(args, make, count: int, how: dict, what: str, max_rejected: float = 0.0) -> None:
    """Writes a folder of records with a bar of progress, and says what was made and what was not."""
    from tqdm import tqdm

    from umm_jax.data.making import make_records
    from umm_jax.data.quarantine import FILE

    runner = None
    if args.beam is not None:
        from umm_jax.data.beam_runner import BeamRunner

        runner = BeamRunner(shlex.split(args.beam))
    with tqdm(total=count, desc=what, unit=" records", disable=None) as bar:
        source = make_records(
            make,
            count,
            args.out,
            how=how,
            shards=args.shards,
            workers=args.workers,
            runner=runner,
            name=args.split,
            max_rejected=max_rejected,
            progress=lambda done, _: bar.update(done - bar.n),
        )
    print(f"{args.out}: {len(source)} conversations in {len(source.manifest['shards'])} shards")
    for kind, counts in source.manifest.get("counts", {}).items():
        for reason, number in counts.items():
            if kind not in ("pictures", "licenses"):
                print(f"{kind}: {number} {reason}")
    if (Path(args.out) / FILE).exists():
        print(f"what was rejected, and why: {Path(args.out) / FILE}")


def _import(args) -> None:
    from umm_jax.data.gate import Limits
    from umm_jax.data.importing import Import

    chosen = {"pixels": args.max_pixels, "bytes": args.max_bytes}
    make = Import(
        args.kind,
        args.annotations,
        args.images,
        settings=set_values(args.set),
        limits=Limits(**{name: limit for name, limit in chosen.items() if limit}),
        seed=args.seed,
        source=args.source,
        license=args.license,
        split=args.split,
    )
    _make(args, make, len(make), make.recipe(), "import", args.max_rejected)


def _tasks(args) -> None:
    from umm_jax.data.tasks import Tasks

    try:
        least, most = map(int, args.chain.split(","))
    except ValueError:
        raise ConfigError(f"--chain is two whole numbers, as 1,3; it is {args.chain!r}") from None
    make = Tasks(args.path, (least, most), args.seed)
    how = make.recipe()
    args.split = how["from"]["name"]
    _make(args, make, len(make), how, "tasks")


def _formats(args) -> None:
    from umm_jax.data import importers

    for kind in importers.names():
        module = importers.get(kind)
        print(f"{kind:16} {module.__doc__.splitlines()[0]}")


def _nth_dialogue(world, seed: int, split: str, index: int):
    """Dialogue `index`; at module level, so that the processes of synthesize can be given it."""
    from umm_jax.world.dialogue import sample_dialogue

    return sample_dialogue(world, seed, index, split)


def _tokenizer(args) -> None:
    import itertools

    from umm_jax import config, families
    from umm_jax.data.files import storage_errors
    from umm_jax.data.inspect import texts
    from umm_jax.data.tokenizer import Tokenizer
    from umm_jax.world import corpus

    (run, world), out, vocab = _world(args), Path(args.out), args.vocab or 1024
    family = families.get(run.family if run else args.family)
    if run and not args.vocab:
        vocab = config.from_dict(family.config.ModelConfig, run.model, "config.model").vocab
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    control = family.stream.control_pieces(run.model if run else {})
    if args.data:
        spoken = itertools.chain.from_iterable(texts(path, args.limit) for path in args.data)
        made = Tokenizer.train(spoken, out, control, vocab, whole_words=False)
    else:
        made = Tokenizer.train(corpus.vocabulary_text(world), out, control, vocab)
    print(f"{out}: {made.size} pieces")


def _inspect(args) -> None:
    from umm_jax.data.inspect import open_any, show, write_html
    from umm_jax.errors import DataError

    found = open_any(args.path)
    if not 0 <= args.index < len(found):
        raise DataError(
            f"{args.path}: there is no record {args.index}; it holds {len(found)}, counted from 0"
        )
    last = min(args.index + args.count, len(found))
    chosen = range(args.index, last)
    if args.html:
        write_html((found[index] for index in chosen), args.html, title=args.path)
        print(f"wrote {args.html}: records {args.index} to {last - 1} of {len(found)}")
        return
    print(f"{args.path}: records {args.index} to {last - 1} of {len(found)}")
    for index in chosen:
        print("\n" + show(found[index], args.images, colour=shows_colour(sys.stdout)))


def _report(args) -> None:
    from umm_jax.data import report

    out = Path(args.out or f"{args.path.rstrip('/')}.report")
    context = report.write(args.path, out, args.against, args.limit)["context"]
    if context["dependent turns"]:
        print(
            f"{context['dependent turns']} dependent turns: {context['necessity']:.2%} need the history; the "
            f"last picture is right in {context['recency baseline']:.1%}, chance is {context['chance']:.1%}"
        )
    print(f"wrote {out / 'report.json'} and {out / 'report.html'}")


def _stats(args) -> None:
    import json

    from umm_jax.data.inspect import stats
    from umm_jax.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer) if args.tokenizer else None
    found = stats(args.path, tokenizer, args.limit)
    if args.config or args.overrides:
        found["rows of this config"] = _fill(args)
    print(json.dumps(found, indent=1, ensure_ascii=False))


def _fill(args) -> dict:
    """How full the rows are that a config makes of these records."""
    import dataclasses

    from umm_jax import config, families
    from umm_jax.data.pipeline import fill_rates
    from umm_jax.data.tokenizer import Tokenizer

    if not args.config:
        raise ConfigError(f"{args.overrides[0]}: there is no config to override; add --config=FILE")
    run = config.load(args.config, args.overrides)
    file = args.tokenizer or run.data.tokenizer
    if not file:
        raise ConfigError("the config names no data.tokenizer; say --tokenizer=FILE")
    family = families.get(run.family)
    serializer = family.stream.Serializer(run.model, Tokenizer.load(file))
    first = run.data.sources[0] if run.data.sources else config.SourceConfig("")
    chosen = dataclasses.replace(first, path=args.path)
    return fill_rates(dataclasses.replace(run.data, sources=(chosen,)), serializer, args.limit)
