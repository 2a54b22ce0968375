"""The commands that launch: a training run, or a sweep, written for the scheduler that is to start it."""

from umm_jax.cli.grammar import command, positive
from umm_jax.errors import ConfigError


def add(commands) -> None:
    """Adds the commands of this group."""
    group = commands.add_parser("launch", help="write a training run or a sweep for a cluster's scheduler")
    kinds = group.add_subparsers(dest="kind", required=True, metavar="KIND")

    p = _job(kinds, "jobset", _jobset, "A JobSet for GKE; give it to kubectl apply -f -.")
    _slices(p)
    p.add_argument("--namespace", default="default")
    p.add_argument("--spot", action="store_true", help="on spot nodes")

    p = _job(kinds, "xpk", _xpk, "The command that starts it with xpk.")
    _slices(p)
    for name in ("cluster", "zone", "project"):
        p.add_argument(f"--{name}", required=True)

    p = _job(kinds, "queued", _queued, "Ask Cloud TPU for the slices, and again after preemption.")
    _slices(p)
    p.add_argument("--project", required=True)
    p.add_argument("--zone", required=True)
    p.add_argument("--spot", action="store_true", help="slices that may be taken away")
    p.add_argument("--reservation", default="", help="name of one")
    p.add_argument("--hours", type=float, help="after which a request that waits is given up")
    p.add_argument("--runtime", default="", help="software of the machines (default: by chip)")
    p.add_argument("--service-account", default="", help="that the machines act as")
    p.add_argument("--state", help="file that the launch is picked up from (default: launches/NAME.json)")
    p.add_argument("--delete", action="store_true", help="give back what was asked for, and end")
    p.add_argument(
        "--dry-run", action="store_true", help="print what would be asked for, and ask for nothing"
    )

    p = _job(kinds, "slurm", _slurm, "A script for sbatch: one task a GPU.")
    p.add_argument("--nodes", type=positive, required=True)
    p.add_argument("--gpus", type=positive, default=8, help="of each node")
    p.add_argument("--hours", type=float, default=24.0, help="of one start; it is put into the queue again")
    p.add_argument("--partition", default="")
    p.add_argument("--image", default="", help="of a container, for clusters with pyxis")


def _job(kinds, name: str, run, text: str):
    p = command(kinds, name, run, text, overridable=True)
    p.add_argument("--config", help="checked here; the same path is given to the machines")
    p.add_argument("--sweep", metavar="PLAN", help="in place of training, each cell of this plan (umm sweep)")
    p.add_argument(
        "--workdir", required=True, help="folder of the run or the sweep, on storage that all machines share"
    )
    p.add_argument("--name", required=True, help="of the job")
    p.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="may be repeated")
    p.add_argument("--restarts", type=positive, default=100, help="that the scheduler may do")
    p.add_argument("--grace", type=positive, default=300, help="seconds from SIGTERM to SIGKILL")
    return p


def _slices(p) -> None:
    p.add_argument("--topology", required=True, help="CHIP:SHAPE of a slice, such as v5e:16x16, v5p:4x4x4")
    p.add_argument("--slices", type=positive, default=1)
    p.add_argument("--image", required=True, help="container image with umm_jax in it")


def _jobset(args) -> None:
    import yaml

    from umm_jax.launch import jobset

    topology, place = _topology(args), {"namespace": args.namespace, "spot": args.spot}
    made = [jobset.manifest(job, topology, args.image, **place) for job in _jobs(args)]
    print(yaml.safe_dump_all(made, sort_keys=False), end="")


def _xpk(args) -> None:
    from umm_jax.launch import lines

    where = {name: getattr(args, name) for name in ("cluster", "zone", "project")}
    for job in _jobs(args):
        print(lines.xpk(job, _topology(args), args.image, **where))


def _queued(args) -> None:
    import concurrent.futures

    jobs = _jobs(args)
    if args.sweep and args.state:
        raise ConfigError("--state: a sweep has a file for each cell, launches/NAME-CELL.json; leave it out")
    if len(jobs) == 1:
        _queue(args, jobs[0])
        return
    # Each cell waits for a slice of its own.
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        for asked in [pool.submit(_queue, args, job) for job in jobs]:
            asked.result()


def _queue(args, job) -> None:
    import json
    import sys
    from pathlib import Path

    from umm_jax.launch import queued

    topology = _topology(args)
    names = ("project", "zone", "image", "spot", "reservation", "runtime", "service_account", "hours")
    place = queued.Place(**{name: getattr(args, name) for name in names})
    record = queued.Record(
        Path(args.state or f"launches/{job.name}.json"), queued.asked(job, topology, place)
    )
    if args.dry_run:
        body = queued.request(job, topology, place, record.resource)
        print("CreateQueuedResource", json.dumps(body, indent=1))
        return
    said = f"{job.name}: " if args.sweep else ""
    say = lambda text: print(f"{said}{text}", file=sys.stderr, flush=True)  # noqa: E731
    if args.delete:
        queued.delete(queued.client(), record, job, place, say=say)
    else:
        print(queued.run(queued.client(), record, job, topology, place, say=say))


def _slurm(args) -> None:
    from umm_jax.launch import lines

    asked = {name: getattr(args, name) for name in ("nodes", "gpus", "hours", "partition", "image")}
    job, cells = _asked(args)
    print(lines.slurm(job, **asked, cells=cells), end="")


def _topology(args):
    from umm_jax.launch.jobset import HOST
    from umm_jax.plan import chips

    found = chips.topology(args.topology, args.slices)
    if args.sweep and found.chips > HOST:
        raise ConfigError(
            f"--topology={args.topology}, {args.slices} slices: a cell of a sweep runs on one machine; take "
            f"a slice of at most {HOST} chips, such as v5e:2x2"
        )
    return found


def _jobs(args):
    """The jobs that are asked for: one, or one for each cell of a sweep."""
    from umm_jax.launch.job import of_cells

    job, cells = _asked(args)
    return of_cells(job, cells) if cells else [job]


def _asked(args):
    """(the job, how many cells it has where it is a sweep, else 0)."""
    from umm_jax.launch.job import Job, of_sweep

    if (args.config is None) == (args.sweep is None):
        raise ConfigError("umm launch: needs --config=FILE, which is trained, or --sweep=PLAN")
    odd = next((text for text in args.env if "=" not in text), None)
    if odd is not None:
        raise ConfigError(f"--env={odd}: expected KEY=VALUE")
    env = dict(text.split("=", 1) for text in args.env)
    job = Job(
        args.name, args.config or "", args.workdir, tuple(args.overrides), env, args.restarts, args.grace
    )
    # A mistake in it is cheaper here than there.
    if args.sweep is None:
        _check(args)
        return job, 0
    from umm_jax.evaluate import sweep

    if args.overrides:
        raise ConfigError(f"{args.overrides[0]}: a sweep's cells say what is changed; leave it out")
    return of_sweep(job, args.sweep), len(sweep.read(args.sweep))


def _check(args) -> None:
    from umm_jax import config, families
    from umm_jax.world.scene import WorldConfig

    run = config.load(args.config, args.overrides)
    config.from_dict(families.get(run.family).config.ModelConfig, run.model, "config.model")
    WorldConfig.of(run)
