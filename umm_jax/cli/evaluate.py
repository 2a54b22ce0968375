"""``umm eval``: what models are worth, in their own world and on published benchmarks."""

from umm_jax.cli.grammar import command, positive, set_values
from umm_jax.errors import ConfigError


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

    p = command(of_eval, "score", _score, "Score responses on a benchmark; needs its annotations, no model.")
    p.add_argument("--task", required=True, help="of umm eval tasks")
    p.add_argument("--data-root", required=True, metavar="DIR", help="folder with the published files")
    p.add_argument("--responses", required=True, metavar="FILE", help='lines {"id": ..., "text": ...}')
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    p.add_argument("--partial", action="store_true", help="score docs that have a response, where some have none")
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


def _score(args) -> None:
    from umm_jax.evaluate import scoring, tasks

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
