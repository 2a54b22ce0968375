"""The whole way of a run of the visual-dialogue world, one public command after another.

    umm data synthesize -> umm data tokenizer -> umm train (the autoencoder first, where the config has one)
    -> umm eval -> umm report

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


def demo(
    config: str, workdir: str | Path, overrides: Sequence[str], do: Callable[[Sequence[str]], None]
) -> None:
    """Runs every step in this process.

    Args:
        config: a config file; overrides: ``--config.a.b=VALUE``, handed to each step that reads the config.
        workdir: folder of the run.
        do: runs one command line, given without the program's name.
    """
    workdir = Path(workdir)
    run = configs.load(config, overrides)
    data, tokenizer = workdir / "data", workdir / "tokenizer.model"
    base = [f"--config={config}", *overrides]

    def step(*words: str) -> None:
        print(f"\n$ umm {shlex.join(words)}", flush=True)
        do(words)

    with cost.stage(workdir, "data"):
        step("data", "synthesize", *base, f"--out={data}", f"--workers={os.cpu_count() or 1}")
        if not tokenizer.exists():
            step("data", "tokenizer", *base, f"--out={tokenizer}")
    base += [
        f"--config.data.sources={json.dumps([{'path': str(data)}])}",
        f"--config.data.tokenizer={tokenizer}",
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
    step("eval", f"--run={workdir}")
    step("report", f"--run={workdir}")
