"""The whole way of a run of the visual-dialogue world, one public command after another.

    umm data synthesize -> umm data tokenizer -> umm train (the autoencoder first, where the config has one)
    -> umm eval -> umm report

Where a config's run goes on from that of another (``world.after``), that one is made and trained
first, in a folder of its own, with the same tokenizer.

Nothing is done here that cannot be typed: each step is a command line, shown before it is run. A step that
finished earlier finds that out itself, so an interrupted demo goes on where it was.
"""

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from umm_jax import config as configs
from umm_jax.evaluate import cost

Do = Callable[[Sequence[str]], None]


def demo(config: str, workdir: str | Path, overrides: Sequence[str], do: Do) -> None:
    """Runs every step in this process.

    Args:
        config: a config file; overrides: ``--config.a.b=VALUE``, handed to each step that reads a config.
        workdir: folder of the run.
        do: runs one command line, given without the program's name.
    """
    workdir = Path(workdir)

    def step(*words: str) -> None:
        print(f"\n$ umm {shlex.join(words)}", flush=True)
        do(words)

    def tokenizer() -> Path:
        """One for all of them, of the last one's words; made when first asked for."""
        path = workdir / "tokenizer.model"
        if not path.exists():
            step("data", "tokenizer", f"--config={config}", *overrides, f"--out={path}")
        return path

    _trained(config, workdir, overrides, tokenizer, step)
    step("eval", f"--run={workdir}")
    step("report", f"--run={workdir}")


def _trained(config: str, workdir: Path, overrides: Sequence[str], tokenizer, step) -> None:
    """Everything up to a trained model, whatever comes before it first."""
    run = configs.load(config, overrides)
    base, data = [f"--config={config}", *overrides], workdir / "data"
    if run.world.after:
        before = Path(config).parent / run.world.after
        first = workdir / before.stem
        _trained(str(before), first, overrides, tokenizer, step)
        base.append(f"--config.train.init_from={first}")
    with cost.stage(workdir, "data"):
        step("data", "synthesize", *base, f"--out={data}", f"--workers={os.cpu_count() or 1}")
        path = tokenizer()
    base += [
        f"--config.data.sources={json.dumps([{'path': str(data)}])}",
        f"--config.data.tokenizer={path}",
    ]
    if run.world.autoencoder:
        first = workdir / "autoencoder"
        changes = ["--config.train.objective=autoencoder", "--config.train.init_from="]
        for section, fields in run.world.autoencoder.items():
            changes += [f"--config.{section}.{key}={json.dumps(value)}" for key, value in fields.items()]
        with cost.stage(workdir, "autoencoder"):
            step("train", *base, f"--workdir={first}", *changes)
        base.append(f"--config.train.init_from={first}")
    step("train", *base, f"--workdir={workdir}")
