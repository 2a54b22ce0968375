"""Commands about runs: train, report, chat, demo."""

import contextlib
import os
import shlex
import shutil
import sys
from pathlib import Path

from umm_jax.cli.grammar import command, natural, positive, shows_colour
from umm_jax.cli.route import add_remote, expert_address

DEMO_CONFIG = "configs/world_tiny.py"
SEEDS = ("train.seed", "data.shuffle_seed")  # what `umm demo --seed` sets


def add(commands) -> None:
    """Adds the commands of this group."""
    p = command(
        commands, "train", _train, "Train the model of a config, or go on with a run.", overridable=True
    )
    p.add_argument("--config", required=True, help="a .py file with get_config(), or a run's config.json")
    p.add_argument("--workdir", required=True, help="folder of the run; an interrupted run there is resumed")
    p.add_argument("--coordinator", help="HOST:PORT of a job's first process; auto asks the cluster")
    p.add_argument("--processes", type=positive, help="of the job")
    p.add_argument("--process", type=natural, help="which of them this is, from 0")

    p = command(
        commands, "replay", _replay, "Say which rows of a batch that went wrong have what loss, part by part."
    )
    p.add_argument("--run", dest="folder", required=True, help="folder of the run")
    p.add_argument("--step", type=positive, required=True, help="the step that went wrong")

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
        "--experts", action="store_true", help="have what a model's calls ask for done by installed experts"
    )
    expert_address(p)
    p.add_argument(
        "--drawn-by",
        metavar="RUN",
        help='a trained model that draws what calls ask for; "rules" are those of the run\'s world',
    )
    p.add_argument(
        "--preview", choices=["auto", "always", "never"], default="auto", help="pictures in the terminal"
    )

    p = command(
        commands, "demo", _demo, "Make data, train, judge and report a small model.", overridable=True
    )
    p.add_argument("--config", default=DEMO_CONFIG, help="a config with a world section")
    p.add_argument("--workdir", default="runs/demo", help="folder of the run; an interrupted demo is resumed")
    p.add_argument("--seed", type=int, help="seed of data and training (default: that of the config)")


def _train(args) -> None:
    from umm_jax import config
    from umm_jax.evaluate import cost

    run = config.load(args.config, args.overrides)
    # The first process of a job keeps its accounts.
    with contextlib.nullcontext() if args.process else cost.stage(args.workdir, "train"):
        # JAX is loaded inside, so that its start counts as part of the stage.
        from umm_jax import processes

        processes.join(args.coordinator, args.processes, args.process)
        from umm_jax.evaluate.runner import in_training
        from umm_jax.plan.utilisation import ideal_seconds
        from umm_jax.train.loop import train

        watched = run.train.eval_every and run.train.objective == "model"
        on_eval = in_training(run, args.workdir) if watched else None
        train(run, args.workdir, on_eval=on_eval, ideal=ideal_seconds)


def _replay(args) -> None:
    from umm_jax.train import anomalies

    before, rows = anomalies.replay(args.folder, args.step)
    print(f"the batch of step {args.step} with the parameters of step {before}")
    for row in rows:
        parts = [f"{name} {'-' if value is None else format(value, '.4g')}" for name, value in row.items()]
        print("  ".join(parts))


def _report(args) -> None:
    from umm_jax.evaluate import report

    for path in report.write(args.folder).values():
        print(f"wrote {path}")


def _chat(args) -> None:
    from umm_jax.generate import chat, load_run

    loaded = load_run(args.folder, args.step, args.weights)
    if args.experts or args.drawn_by or args.expert:
        _attend(loaded, args)
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


def _attend(loaded, args) -> None:
    """Puts experts at the model's side."""
    from umm_jax.errors import ConfigError
    from umm_jax.evaluate.world_expert import WorldExpert
    from umm_jax.generate import load_run
    from umm_jax.router.execute import Executor
    from umm_jax.router.experts import Registry
    from umm_jax.router.native import Drawing
    from umm_jax.router.replies import attend
    from umm_jax.world.scene import WorldConfig

    registry = Registry.installed() if args.experts else Registry({})
    add_remote(registry, args.expert)
    if args.drawn_by == "rules":
        registry.add(WorldExpert(WorldConfig.of(loaded.run)))
    elif args.drawn_by:
        other = load_run(args.drawn_by)
        if hasattr(other.replier, "experts"):
            raise ConfigError(
                f"--drawn-by={args.drawn_by}: a model of the {other.run.family} family draws nothing"
            )
        registry.add(Drawing(other.replier, version=f"step {other.step}", settings=other.run.reply))
    if attend(loaded.replier, Executor(registry)) is None:
        raise ConfigError(
            f"{args.folder}: a model of the {loaded.run.family} family draws by itself and calls nobody; "
            "leave out --experts, --expert and --drawn-by"
        )


def _demo(args) -> None:
    from umm_jax.cli import dispatch
    from umm_jax.demo import demo

    seeds = [] if args.seed is None else [f"--config.{k}={args.seed}" for k in SEEDS]
    demo(args.config, args.workdir, [*seeds, *args.overrides], dispatch)
    program = "umm" if shutil.which("umm") else os.path.relpath(sys.argv[0])
    folder = shlex.quote(str(args.workdir))
    print(f"\nlook at   {Path(args.workdir) / 'report.html'}\ntalk to   {program} chat --run={folder}")
