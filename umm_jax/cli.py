"""The ``umm`` command: parse, load the config, call one function.

Nothing heavy is imported until a command runs. What the user can mend is one line on stderr and an exit
status of its own (see :mod:`umm_jax.errors`); anything else is a bug and keeps its traceback. All commands
are in this one file: together they are the grammar of the command line.
"""

import argparse
import errno
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from umm_jax.config import suggest
from umm_jax.errors import ConfigError, StorageError, UserError

DEMO_CONFIG = "configs/world_tiny.py"
SEEDS = ("train.seed", "data.shuffle_seed")  # what `umm demo --seed` sets


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit status."""
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


def shows_colour(stream) -> bool:
    """Whether `stream` is a terminal that says it can show 24-bit colour, and the user did not opt out."""
    if not stream.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb":
        return False
    return os.environ.get("COLORTERM", "") in ("truecolor", "24bit") or "direct" in os.environ["TERM"]


def _complain(message: str, status: int) -> int:
    print(f"umm: error: {' '.join(message.split())}", file=sys.stderr)
    return status


# --- the grammar of the command line ------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are ConfigErrors: one line, with the nearest name where one was misspelt."""

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options
        )

    def error(self, message: str):
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if wrong:
            choices = re.findall(r"[\w-]+", wrong[2])
            raise ConfigError(f"{self.prog}: {wrong[1]!r} is unknown{suggest(wrong[1], choices)}")
        raise ConfigError(f"{self.prog}: {message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="umm", description="Conversational unified multimodal models in JAX.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(into, name: str, run, text: str, *, overridable: bool = False) -> argparse.ArgumentParser:
        made = into.add_parser(name, help=text, description=text)
        made.set_defaults(run=run, overridable=overridable, parser=made)
        if overridable:
            made.epilog = "Any value of the config is set with --config.a.b=VALUE."
        return made

    data = commands.add_parser("data", help="write and look at conversations on disk")
    of_data = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)

    def of_the_world(name: str, run, text: str) -> argparse.ArgumentParser:
        made = command(of_data, name, run, text, overridable=True)
        made.add_argument("--config", help="take the world, and how much of it, from this config")
        made.add_argument("--preset", help="world preset (default: tiny, or that of the config)")
        made.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the preset"
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
    p.add_argument("--stages", default="1,2,3", help="with --from: which stages, such as 1,2")
    p.add_argument("--rewriter", default="template", choices=["template", "openai", "replay"])
    p.add_argument("--endpoint", metavar="URL", help="of an OpenAI-compatible API, for --rewriter=openai")
    p.add_argument("--model", default="", help="as the endpoint calls it")
    p.add_argument("--key", default="", metavar="NAME", help="environment variable that holds its key")
    p.add_argument("--cache", metavar="FOLDER", help="replies of the endpoint (default: OUT.cache)")
    p.add_argument("--budget", type=int, default=0, help="requests of each worker at most; 0 is no limit")
    p.add_argument("--count", type=_positive, help="number of conversations (default: one for each record)")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--seed", type=int, help="another seed, other conversations (default: 0, or the config's)")
    p.add_argument("--split", default="train", help="which scenes may appear")
    p.add_argument("--shards", type=_positive, default=4, help="number of files")
    p.add_argument("--workers", type=int, default=1, help="processes that generate")

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
    p.add_argument("--limit", type=_positive, default=100_000, help="records of a path to read at most")
    p.add_argument("--out", required=True, help="file to write, for example runs/demo/tokenizer.model")
    p.add_argument(
        "--family", default="mm_interleaved", help="whose control pieces to add where there is no --config"
    )
    p.add_argument(
        "--vocab", type=_positive, help="largest number of pieces (default: 1024, or what the model can hold)"
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
    p.add_argument("--max-pixels", type=_positive, help="of a picture (default: 64 million)")
    p.add_argument("--max-bytes", type=_positive, help="of an encoded picture (default: 20 MiB)")
    p.add_argument("--source", default="", help="name of the source in the records (default: the kind)")
    p.add_argument("--license", default="", help="terms the records may be used under")
    p.add_argument("--split", default="train", help="name of the split")
    p.add_argument("--shards", type=_positive, default=8, help="number of files")
    p.add_argument("--workers", type=int, default=1, help="processes that import")

    command(of_data, "formats", _formats, "List what import reads.")

    p = command(of_data, "inspect", _inspect, "Show conversations of a shard, a folder or a JSON file.")
    p.add_argument("path", help="a folder of shards, one of them, or a .json, .jsonl or .msgpack file")
    p.add_argument("--index", type=int, default=0, help="first conversation to show")
    p.add_argument("--count", type=_positive, default=1, help="how many to show")
    p.add_argument("--images", metavar="FOLDER", help="write their pictures there")
    p.add_argument("--html", metavar="FILE", help="write them as a page instead")

    p = command(of_data, "report", _report_data, "Write what a folder holds as a page of figures.")
    p.add_argument("path", help="a finished folder")
    p.add_argument("--out", help="folder for report.json and report.html (default: PATH.report)")
    p.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="FOLDER",
        help="look for the same pictures and words here, in an evaluation set say; can be repeated",
    )
    p.add_argument("--limit", type=_positive, default=20_000, help="records to read at most")

    p = command(of_data, "stats", _stats, "Count what a folder of shards holds.")
    p.add_argument("path", help="whatever inspect opens")
    p.add_argument("--tokenizer", metavar="FILE", help="count text tokens too")
    p.add_argument("--limit", type=_positive, default=2000, help="conversations to read at most")

    p = command(
        commands, "train", _train, "Train the model of a config, or go on with a run.", overridable=True
    )
    p.add_argument("--config", required=True, help="a .py file with get_config(), or a run's config.json")
    p.add_argument("--workdir", required=True, help="folder of the run; an interrupted run there is resumed")

    p = command(commands, "eval", _eval, "Judge a run on the skills of its world, beside shortcut oracles.")
    p.add_argument("--run", dest="folder", required=True, help="folder of the run")
    p.add_argument("--step", type=int, help="checkpoint to judge (default: the newest)")
    p.add_argument("--splits", help="held-out splits, comma-separated (default: those of the config)")
    p.add_argument("--items", type=_positive, help="items per skill (default: that of the config)")
    p.add_argument("--weights", choices=["raw", "ema"], help="which weights (default: that of the config)")
    p.add_argument("--again", action="store_true", help="judge anew what was already judged")

    p = command(commands, "report", _report, "Write report.json and report.html of a judged run.")
    p.add_argument("--run", dest="folder", required=True, help="folder of the run")

    p = command(commands, "chat", _chat, "Talk with a trained model. /help lists what else can be typed.")
    p.add_argument("--run", dest="folder", required=True, help="folder of the run")
    p.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    p.add_argument("--weights", choices=["raw", "ema"], help="which weights (default: that of the config)")
    p.add_argument(
        "--say", action="append", metavar="LINE", help="say this instead of asking; may be repeated"
    )
    p.add_argument("--seed", type=int, default=0, help="the same words and seed give the same replies")
    p.add_argument(
        "--preview", choices=["auto", "always", "never"], default="auto", help="pictures in the terminal"
    )

    p = command(
        commands, "demo", _demo, "Make data, train, judge and report a small model.", overridable=True
    )
    p.add_argument("--config", default=DEMO_CONFIG, help="a config with a world section")
    p.add_argument("--workdir", default="runs/demo", help="folder of the run; an interrupted demo is resumed")
    p.add_argument("--seed", type=int, help="seed of data and training (default: that of the config)")

    convert = commands.add_parser("convert", help="weights to and from PyTorch")
    of_convert = convert.add_subparsers(dest="convert_command", metavar="COMMAND", required=True)

    p = command(of_convert, "from-torch", _from_torch, "Make a run folder of a PyTorch checkpoint.")
    p.add_argument("source", help="a folder of weights, an index of shards, a .safetensors, .bin or .pt file")
    p.add_argument("--out", required=True, help="run folder to make")
    p.add_argument("--config", help="whose model it is (default: config.json beside them, or the release)")
    p.add_argument("--family", help="whose names the tensors have, where no config says (mm_interleaved)")
    p.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model (default: the one beside them)")
    p.add_argument("--allow-pickle", action="store_true", help="read .bin and .pt too, with weights_only")
    p.add_argument("--no-checksums", action="store_true", help="do not check sha256sums beside the weights")

    p = command(of_convert, "to-torch", _to_torch, "Write a checkpoint of a run for PyTorch.")
    p.add_argument("--run", dest="folder", required=True, help="folder of the run")
    p.add_argument("--out", required=True, help="folder to make")
    p.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    p.add_argument("--weights", choices=["raw", "ema"], default="raw", help="which weights")
    p.add_argument("--shard-size", type=_size, default="5GB", help="largest file")
    p.add_argument("--memory", type=_size, default="1GB", help="for layers that must be read together")
    p.add_argument(
        "--dtype",
        choices=["keep", "float32", "float16", "bfloat16"],
        default="keep",
        help="keep: that of the weights when they came from PyTorch, else that of the checkpoint",
    )
    p.add_argument(
        "--part",
        choices=["llm", "clip", "unet", "vae", "all"],
        help="only this part, as a folder for its class of transformers or diffusers",
    )
    p.add_argument("--verified", metavar="FILE", help="output of umm convert verify --json, for parity.json")

    p = command(of_convert, "verify", _verify, "Compare our numbers with tensors of a reference, row by row.")
    p.add_argument("path", help="folder of fixtures: config.json, model.safetensors, a_*.safetensors, ...")
    p.add_argument("--json", metavar="FILE", help="write the rows there too")
    p.add_argument(
        "--only", metavar="NAMES", help="fixture files to compare, comma-separated beginnings: a,g,h"
    )

    p = command(
        of_convert,
        "from-parts",
        _from_parts,
        "Begin a model from stock parts: a run folder for train.init_from.",
        overridable=True,
    )
    p.add_argument("--config", required=True, help="the model that is begun")
    p.add_argument("--out", required=True, help="run folder to make")
    p.add_argument("--llama", metavar="DIR", help="folder of the language model: a Llama, Vicuna or Qwen2")
    p.add_argument("--clip", metavar="DIR", help="folder of a CLIP, whole or its vision model")
    p.add_argument("--siglip", metavar="DIR", help="folder of a SigLIP2, whole or its vision model")
    p.add_argument("--unet", metavar="DIR", help="folder of Stable Diffusion's unet")
    p.add_argument("--vae", metavar="DIR", help="folder of Stable Diffusion's vae, or FLUX's; or its file")
    p.add_argument(
        "--text-encoder", metavar="DIR", help="its text_encoder, for the empty prompt (needs torch)"
    )
    p.add_argument("--tokenizer2", metavar="DIR", help="its tokenizer, to go with the text encoder")
    p.add_argument("--allow-pickle", action="store_true", help="read .bin and .pt too, with weights_only")
    p.add_argument("--no-checksums", action="store_true", help="do not check sha256sums beside the weights")

    command(commands, "version", _version, "Print the versions of umm_jax and of what it stands on.")
    return top


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMG]?)(i?)B?", text, re.IGNORECASE)
    size = found and float(found[1]) * (1024 if found[3] else 1000) ** " kmg".index(found[2].lower() or " ")
    if not size or size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 5GB, got {text!r}")
    return int(size)


# --- the commands -------------------------------------------------------------------------------------


def _world(args):
    """The RunConfig of --config, or None, and the WorldConfig of it, --preset and --set."""
    from umm_jax import config
    from umm_jax.world.scene import WorldConfig

    run = config.load(args.config, args.overrides) if args.config else None
    if args.overrides and not run:
        raise ConfigError(f"{args.overrides[0]}: there is no config to override; add --config=FILE")
    values = dict(run.world.overrides) if run and args.preset in (None, run.world.preset) else {}
    values |= _settings(args.set)
    return run, WorldConfig.preset(args.preset or (run.world.preset if run else "tiny"), **values)


def _settings(texts: Sequence[str]) -> dict:
    """The values of --set KEY=VALUE; JSON, or a bare string where it is not."""
    import json

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


def _synthesize(args) -> None:
    import functools

    from umm_jax.config import to_dict
    from umm_jax.world.dialogue import VERSION

    if args.folders:
        return _compose(args)
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
        stages = [int(stage) for stage in args.stages.split(",")]
    except ValueError:
        raise ConfigError(f"--stages is a list such as 1,2,3, got {args.stages!r}") from None
    settings = from_dict(Stages, {"stages": stages, **_settings(args.set)}, "stages")
    rewriter = None
    if args.rewriter != "template":
        if not args.endpoint or not args.model:
            raise ConfigError(f"--rewriter={args.rewriter} needs --endpoint=URL and --model=NAME")
        endpoint = rewriters.Endpoint(args.endpoint, args.model, args.key, budget=args.budget)
        kind = rewriters.OpenAIRewriter if args.rewriter == "openai" else rewriters.ReplayRewriter
        rewriter = kind(endpoint, rewriters.Cache(args.cache or f"{args.out.rstrip('/')}.cache"))
    make = Synthesizer(args.folders, settings, rewriter=rewriter, seed=args.seed or 0, split=args.split)
    _make(args, make, args.count or len(make), make.recipe(), "synthesize")


def _make(args, make, count: int, how: dict, what: str, max_rejected: float = 0.0) -> None:
    """Writes a folder of records with a bar of progress, and says what was made and what was not."""
    from tqdm import tqdm

    from umm_jax.data.making import make_records
    from umm_jax.data.quarantine import FILE

    with tqdm(total=count, desc=what, unit=" records", disable=None) as bar:
        source = make_records(
            make,
            count,
            args.out,
            how=how,
            shards=args.shards,
            workers=args.workers,
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
        settings=_settings(args.set),
        limits=Limits(**{name: limit for name, limit in chosen.items() if limit}),
        seed=args.seed,
        source=args.source,
        license=args.license,
        split=args.split,
    )
    _make(args, make, len(make), make.recipe(), "import", args.max_rejected)


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


def _report_data(args) -> None:
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
    print(json.dumps(stats(args.path, tokenizer, args.limit), indent=1, ensure_ascii=False))


def _train(args) -> None:
    from umm_jax import config
    from umm_jax.evaluate import cost

    run = config.load(args.config, args.overrides)
    with cost.stage(args.workdir, "train"):
        # JAX is loaded inside, so that its start counts as part of the stage.
        from umm_jax.evaluate.runner import in_training
        from umm_jax.train.loop import train

        watched = run.train.eval_every and run.train.objective == "model"
        train(run, args.workdir, on_eval=in_training(run, args.workdir) if watched else None)


def _eval(args) -> None:
    from umm_jax.evaluate import cost

    with cost.stage(args.folder, "evaluate"):
        from umm_jax.evaluate import runner

        splits = args.splits.split(",") if args.splits else None
        results = runner.evaluate(
            args.folder,
            step=args.step,
            splits=splits,
            items=args.items,
            weights=args.weights,
            again=args.again,
        )
    print(runner.summary(results))


def _report(args) -> None:
    from umm_jax.evaluate import report

    for path in report.write(args.folder).values():
        print(f"wrote {path}")


def _chat(args) -> None:
    from umm_jax.generate import chat, load_run

    loaded = load_run(args.folder, args.step, args.weights)
    colour = args.preview == "always" or (args.preview == "auto" and shows_colour(sys.stdout))
    talk = chat.Chat(
        loaded.replier, loaded.run.reply, Path(args.folder) / "chat", seed=args.seed, colour=colour
    )
    if args.say:
        chat.run(talk, args.say, stop_on_error=True)
        return
    print(
        f"{args.folder}, step {loaded.step}. The first reply takes a while (compiling). /help lists commands."
    )
    chat.run(talk, chat.typed())


def _demo(args) -> None:
    from umm_jax.demo import demo

    seeds = [] if args.seed is None else [f"--config.{k}={args.seed}" for k in SEEDS]
    demo(args.config, args.workdir, [*seeds, *args.overrides], dispatch)
    program = "umm" if shutil.which("umm") else os.path.relpath(sys.argv[0])
    folder = shlex.quote(str(args.workdir))
    print(f"\nlook at   {Path(args.workdir) / 'report.html'}\ntalk to   {program} chat --run={folder}")


def _from_torch(args) -> None:
    from umm_jax.convert.from_torch import from_torch

    from_torch(
        args.source,
        args.out,
        config=args.config,
        family=args.family,
        allow_pickle=args.allow_pickle,
        checksums=not args.no_checksums,
        tokenizer=args.tokenizer,
    )


def _to_torch(args) -> None:
    from umm_jax.convert.to_torch import to_torch

    to_torch(
        args.folder,
        args.out,
        step=args.step,
        weights=args.weights,
        dtype=args.dtype,
        shard_size=args.shard_size,
        memory=args.memory,
        verified=args.verified,
        part=args.part,
    )


def _verify(args) -> None:
    import json

    # The bounds are those of float32 on a CPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from umm_jax.convert import verify
    from umm_jax.data.files import write_atomic
    from umm_jax.errors import ParityError

    print(verify.HEADER)
    rows = []
    for row in verify.checks(args.path, args.only.split(",") if args.only else ()):
        print(verify.line(row), flush=True)
        rows.append(row)
    if args.json:
        write_atomic(args.json, json.dumps(verify.as_json(rows), indent=1) + "\n")
    if not rows:
        raise ConfigError(f"{args.path}: nothing here to compare")
    if not all(row.passed for row in rows):
        raise ParityError(verify.summary(rows))
    print(verify.summary(rows))


def _from_parts(args) -> None:
    from umm_jax import config
    from umm_jax.convert.from_parts import from_parts

    parts = {"llm": args.llama, "clip": args.clip, "vit": args.siglip, "unet": args.unet, "vae": args.vae}
    from_parts(
        config.load(args.config, args.overrides),
        args.out,
        {name: path for name, path in parts.items() if path},
        text_encoder=args.text_encoder,
        text_tokenizer=args.tokenizer2,
        allow_pickle=args.allow_pickle,
        checksums=not args.no_checksums,
    )


def _version(args) -> None:
    from umm_jax.evaluate.report import versions

    print("  ".join(f"{name} {number}" for name, number in versions().items()))


if __name__ == "__main__":
    sys.exit(main())
