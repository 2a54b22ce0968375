"""``umm eval``: what models are worth, in their own world and on published benchmarks."""

from umm_jax.cli.grammar import command, natural, positive, set_values
from umm_jax.errors import ConfigError, DataError


def add(commands) -> None:
    """Adds the commands of this group."""
    p = command(
        commands,
        "eval",
        _world,
        "Judge a run on the skills of its world, beside shortcut oracles; or one of the commands below.",
    )
    p.add_argument("--run", dest="folder", help="folder of the run to judge in its world")
    p.add_argument("--step", type=int, help="checkpoint to judge (default: the newest)")
    p.add_argument("--splits", help="held-out splits, comma-separated (default: those of the config)")
    p.add_argument("--items", type=positive, help="items per skill (default: that of the config)")
    p.add_argument("--weights", choices=["raw", "ema"], help="which weights (default: that of the config)")
    p.add_argument("--again", action="store_true", help="judge anew what was already judged")
    of_eval = p.add_subparsers(dest="eval_command", metavar="COMMAND")

    p = command(of_eval, "tasks", _tasks, "List the benchmarks, what each needs and how it is scored.")
    p.add_argument("name", nargs="?", help="say everything about this one")

    p = command(of_eval, "plan", _plan, "Write what a model is to be asked on a benchmark.")
    p.add_argument("--run", dest="folder", required=True, help="folder of the run")
    p.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    p.add_argument("--weights", choices=["raw", "ema"], help="which weights (default: that of the config)")
    p.add_argument("--reply", action="append", default=[], metavar="KEY=VALUE", help="how it replies")
    p.add_argument("--seed", type=int, default=0, help="of all replies")
    p.add_argument("--batch-size", type=positive, help="docs asked together (default: that of the config)")
    p.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    _benchmark(p, required=True)

    p = command(of_eval, "run", _run, "Ask what was planned and has no response yet; may be killed any time.")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of umm eval plan")
    p.add_argument("--retry", action="store_true", help="ask anew what could not be asked")
    p.add_argument("--devices", type=positive, help="that hold a part of the model each (default: all here)")
    p.add_argument("--share", default="0/1", metavar="K/N", help="of N processes, this is the K-th, from 0")

    p = command(of_eval, "score", _score, "Score responses on a benchmark; needs its annotations, no model.")
    p.add_argument("--out", metavar="DIR", help="folder of umm eval run")
    p.add_argument("--responses", metavar="FILE", help='or a file of lines {"id": ..., "text": ...}')
    _benchmark(p, required=False)
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    p.add_argument(
        "--partial", action="store_true", help="score docs that have a response, where some have none"
    )

    p = command(
        of_eval, "export", _export, "Write replies' pictures as a benchmark's official tool wants them."
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder of umm eval run")
    p.add_argument("--to", required=True, metavar="DIR", help="folder to make")

    p = command(of_eval, "judge", _judge, "Have an OpenAI-compatible endpoint judge replies' pictures.")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of umm eval run")
    p.add_argument("--to", required=True, metavar="FILE", help="file of verdicts, for --set verdicts=FILE")
    p.add_argument("--url", required=True, help="of the endpoint, up to /v1")
    p.add_argument("--model", required=True, help="its name there")
    p.add_argument("--key", default="", metavar="NAME", help="variable of the environment with the key")
    p.add_argument("--cache", metavar="FILE", help="of answers, so that nothing is asked twice (TO.cache)")
    p.add_argument("--templates", metavar="FILE", help="JSON with other words than ours, by question")
    p.add_argument("--seconds", type=positive, default=120, help="for one answer")
    p.add_argument("--budget", type=natural, default=0, help="most requests; 0 is no bound")

    p = command(
        of_eval, "table", _table, "Set score files side by side; cells that cannot be compared say so."
    )
    p.add_argument("scores", nargs="+", help="score files, or folders of them; NAME=PATH names a column")
    p.add_argument("--format", choices=["md", "csv", "html"], default="md")
    p.add_argument("--figure", help="this one (default: each benchmark's headline)")

    p = command(commands, "sweep", _sweep, "Many models on many benchmarks; goes on where it was.")
    p.add_argument("plan", help="a .py file with get_sweep(), see umm_jax/evaluate/sweep.py")
    p.add_argument("--out", metavar="DIR", help="folder of the results (default: sweeps/NAME OF THE PLAN)")
    p.add_argument("--dry-run", action="store_true", help="print what would be run and what is there")
    p.add_argument(
        "--cell",
        type=natural,
        help="only this cell, as --dry-run numbers them; tables are left to a last run",
    )


def _benchmark(p, required: bool) -> None:
    """Arguments that say what is asked."""
    p.add_argument("--task", required=required, help="of umm eval tasks")
    p.add_argument("--data-root", metavar="DIR", help="folder with the benchmark's published files")
    p.add_argument("--limit", type=positive, help="only the first docs")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the task")


def _world(args) -> None:
    if args.folder is None:
        raise ConfigError("umm eval: --run=DIR judges a run in its world; umm eval --help lists commands")
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


def _tasks(args) -> None:
    from umm_jax.evaluate import tasks

    if args.name is None:
        for name, task in tasks.every().items():
            print(f"{name:18} {task.cost}  {task.headline:12} {task.files}")
        return
    task = tasks.get(args.name)
    print(f"{task.name}: {task.headline}, {task.scale[0]:g} to {task.scale[1]:g}; cost class {task.cost}")
    print(f"files: {task.files}\nreplies are compared after: {task.post}")
    print(task.Settings.__doc__)


def _plan(args) -> None:
    from umm_jax.evaluate import benchmark
    from umm_jax.generate import identify
    from umm_jax.world.scene import WorldConfig

    model = identify(args.folder, args.step, args.weights)
    job = benchmark.Job(
        args.task, set_values(args.set), args.data_root, set_values(args.reply), args.limit, args.seed
    )
    planned = benchmark.plan(job, model.to_dict(), WorldConfig.of(model.run), model.run.reply)
    batch_size = args.batch_size or model.run.eval.batch_size
    counts = benchmark.write_plan(args.out, planned, model.to_dict(), batch_size)
    print(f"{args.out}: {counts['docs']} docs, {counts['answered']} of them answered")


def _run(args) -> None:
    from umm_jax.evaluate import benchmark
    from umm_jax.evaluate.world_expert import attended
    from umm_jax.generate import identify, load_run
    from umm_jax.world.scene import WorldConfig

    index, slash, count = args.share.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"--share={args.share}: expected K/N with K from 0 to N-1")
    job, model = benchmark.read_plan(args.out)
    chosen = model["folder"], model["step"], model["weights"], tuple(model["overrides"])
    identity = identify(*chosen)
    planned = benchmark.plan(job, identity.to_dict(), WorldConfig.of(identity.run), identity.run.reply)
    benchmark.check_planned(args.out, planned)
    spent = benchmark.run(
        args.out,
        planned,
        lambda: attended(load_run(*chosen, devices=args.devices)),
        index=int(index),
        count=int(count),
        retry=args.retry,
    )
    print(f"{spent.docs} docs in {spent.seconds:.1f} s, {spent.in_model:.1f} s of them inside the model")


def _score(args) -> None:
    from umm_jax.evaluate import benchmark, scoring, tasks

    if (args.out is None) == (args.responses is None):
        raise ConfigError("umm eval score: needs --out=DIR of umm eval run, or --responses=FILE and --task")
    if args.out is not None:
        if args.task or args.data_root or args.limit:
            raise ConfigError(
                "umm eval score: --out=DIR says what was asked; leave out --task and its settings"
            )
        figures = benchmark.score(args.out, judging=set_values(args.set), partial=args.partial)
    else:
        if not (args.task and args.data_root):
            raise ConfigError("umm eval score: --responses=FILE needs --task=NAME and --data-root=DIR")
        figures = scoring.score(
            tasks.get(args.task),
            args.data_root,
            args.responses,
            settings=set_values(args.set),
            partial=args.partial,
            limit=args.limit,
        )
    print(scoring.lines(figures))
    if args.json:
        scoring.write(args.json, figures)


def _export(args) -> None:
    from umm_jax.evaluate import benchmark
    from umm_jax.evaluate.store import Folder

    task, _, docs, _ = benchmark.planned_docs(args.out)
    if task.export is None:
        raise ConfigError(
            f"umm eval export: {task.name} has no official tool that its replies are written for"
        )
    missing = task.export(docs, Folder(args.out).responses(), args.to)
    print(f"wrote {args.to}: {len(docs) - len(missing)} of {len(docs)} docs have a picture")


def _judge(args) -> None:
    from umm_jax.evaluate import benchmark, judges
    from umm_jax.evaluate.store import Folder

    task, _, docs, _ = benchmark.planned_docs(args.out)
    if task.questions is None:
        raise ConfigError(f"umm eval judge: {task.name} asks no judge")
    chosen = judges.JudgeSettings(
        "openai",
        url=args.url,
        model=args.model,
        key=args.key,
        seconds=args.seconds,
        budget=args.budget,
        cache=args.cache or f"{args.to}.cache",
    )
    templates = judges.read_templates(args.templates, task.templates) if args.templates else task.templates
    judge = judges.make(chosen, templates)
    asked = task.questions(docs, Folder(args.out).responses(), templates)
    counts = judges.collect(judge, asked, args.to)
    print(
        f"wrote {args.to}: {counts['asked']} asked of {judge.identity}, {counts['failed']} without an answer"
    )


def _table(args) -> None:
    from pathlib import Path

    from umm_jax.evaluate import table

    columns = []
    for text in args.scores:
        name, equals, path = ("", "", text) if Path(text).exists() else text.partition("=")
        columns.append(table.Column(name if equals else text, table.read(path if equals else text)))
    made = table.build(columns, args.figure)
    if args.format == "html":
        print(table.page(made, "Benchmarks"), end="")
    else:
        print({"md": table.markdown, "csv": table.comma_separated}[args.format](made), end="")


def _sweep(args) -> None:
    from pathlib import Path

    from umm_jax.evaluate import sweep

    cells = sweep.read(args.plan)
    out = Path(args.out or Path("sweeps") / Path(args.plan).stem)
    if args.cell is not None and args.cell >= len(cells):
        raise ConfigError(f"--cell={args.cell}: the plan has {len(cells)} cells, numbered from 0")
    chosen = cells if args.cell is None else [cells[args.cell]]
    if args.dry_run:
        for line in sweep.dry_run(chosen, out):
            print(line)
        return
    failed, spent = sweep.run(chosen, out)
    if spent.docs:
        share = spent.in_model / spent.seconds
        print(f"{spent.docs} docs in {spent.seconds:.1f} s, {share:.1%} of it inside the model")
    # One cell is one of many jobs: they would write over one another's tables.
    for path in sweep.write_tables(cells, out, Path(args.plan).stem) if args.cell is None else ():
        print(f"wrote {path}")
    if failed:
        raise DataError(
            f"{failed} of {len(chosen)} cells failed; the table says why; run again to try them anew"
        )
