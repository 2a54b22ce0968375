"""The command that plans: what a config needs of chips that are not there."""

import json
from pathlib import Path

from umm_jax.cli.grammar import command, positive
from umm_jax.errors import ConfigError


def add(commands) -> None:
    """Adds the commands of this group."""
    p = command(
        commands,
        "plan",
        _plan,
        "Compile a config's training step for a TPU topology, no TPU needed, and report memory, work, "
        "communication and an estimated step time.",
        overridable=True,
    )
    p.add_argument("--config", required=True, help="a .py file with get_config(), or a run's config.json")
    p.add_argument(
        "--topology",
        required=True,
        help="CHIP:SHAPE of a slice, such as v5e:16x16, v5p:4x4x4, v6e:8x8; or local, for the devices here",
    )
    p.add_argument(
        "--slices", type=positive, default=1, help="slices of that shape; the data axis spans them"
    )
    p.add_argument(
        "--placements",
        action="store_true",
        help="print where every parameter lies instead, without compiling",
    )
    p.add_argument("--json", metavar="FILE", help="write all that was found there")
    p.add_argument("--html", metavar="FILE", help="write a page with a memory timeline and a roofline there")
    p.add_argument(
        "--quick",
        action="store_true",
        help="let the compiler search less: several times faster, of much the same memory, and a longer time",
    )
    p.add_argument("--sweep", action="store_true", help="try meshes, rows and policies; print a table")
    p.add_argument("--rows", default="1,2,4,8", help="with --sweep: rows of a batch on each device")
    p.add_argument("--tensor", default="1", help="with --sweep: sizes of the tensor axis")
    p.add_argument("--data", default="1", help="with --sweep: sizes of the data axis")
    p.add_argument("--sequence", default="1", help="with --sweep: sizes of the sequence axis")
    p.add_argument(
        "--remat",
        default="",
        help="with --sweep: of none, dots_attention, dots_no_batch, dots, attention, full; or the config's",
    )


def _plan(args) -> None:
    from umm_jax import config
    from umm_jax.data.files import write_atomic
    from umm_jax.plan import chips, estimate, page

    run = config.load(args.config, args.overrides)
    topology = None if args.topology == "local" else chips.topology(args.topology, args.slices)
    pages = [f"--{name}" for name in ("json", "html") if getattr(args, name)]
    if pages and args.placements or args.html and args.sweep:
        raise ConfigError(f"{pages[-1]}: {'--placements' if args.placements else '--sweep'} only prints")
    if args.placements:
        import jax

        from umm_jax.plan import steps

        print(steps.placements(run, topology.chips if topology else jax.device_count()))
        return
    if args.sweep:
        _sweep(args, run, topology)
        return
    found = _report(run, topology, args.quick)
    print("\n".join(estimate.lines(found)))
    if args.json:
        write_atomic(Path(args.json), (json.dumps(found.to_json(), indent=1) + "\n").encode())
    if args.html:
        write_atomic(Path(args.html), page.page(found).encode())
    if not found.fits:
        raise ConfigError(
            f"{args.config} does not fit on {found.topology}; try --sweep --remat=full with fewer --rows, a "
            "larger mesh.fsdp, mesh.tensor or mesh.sequence, or more chips"
        )


def _report(run, topology, quick):
    from umm_jax.plan import compiling, estimate

    made = compiling.compiled(run, topology, quick=quick)
    return estimate.report(made, topology, run.data.batch_size * run.data.tokens)


def _sweep(args, run, topology) -> None:
    import itertools
    import sys

    from umm_jax.config import from_dict, to_dict
    from umm_jax.data.files import write_atomic
    from umm_jax.families import get
    from umm_jax.plan import sweep

    if topology is None:
        raise ConfigError("--sweep compares estimates, which local devices have none of; give a TPU topology")
    numbers = {name: _numbers(name, getattr(args, name)) for name in ("rows", "tensor", "data", "sequence")}
    policies = [p.strip() for p in args.remat.split(",") if p.strip()] or [None]
    if odd := [p for p in policies if p and p not in sweep.POLICIES]:
        raise ConfigError(f"--remat: {odd[0]!r} is none of {', '.join(sweep.POLICIES)}")
    # Every policy of the model is set, those that the file leaves at their defaults, too.
    import dataclasses

    model = from_dict(get(run.family).config.ModelConfig, run.model, "config.model")
    run = dataclasses.replace(run, model=to_dict(model))
    choices = [
        sweep.Choice(mesh, rows, policy)
        for mesh, policy, rows in itertools.product(
            sweep.meshes(topology.chips, numbers["tensor"], numbers["data"], numbers["sequence"]),
            policies,
            sorted(numbers["rows"]),
        )
    ]
    say = lambda text: print(f"compiling {text}", file=sys.stderr, flush=True)  # noqa: E731
    tried = list(sweep.sweep(run, choices, lambda one: _report(one, topology, args.quick), say))
    print("\n".join(sweep.table(tried)))
    if args.json:
        rows = [
            {"choice": dataclasses.asdict(t.choice), "why": t.why, "report": t.report and t.report.to_json()}
            for t in tried
        ]
        write_atomic(Path(args.json), (json.dumps(rows, indent=1) + "\n").encode())


def _numbers(name: str, text: str) -> list[int]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or not all(part.isdecimal() and int(part) > 0 for part in found):
        raise ConfigError(f"--{name}: expected whole numbers such as 1,2,4; got {text!r}")
    return [int(part) for part in found]
