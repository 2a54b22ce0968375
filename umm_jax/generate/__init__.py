"""From a run directory to replies: ``load("runs/demo").reply([conversation], settings, seeds)``."""

import zlib
from dataclasses import dataclass
from pathlib import Path

from umm_jax import config as configs
from umm_jax.config import RunConfig
from umm_jax.errors import CheckpointError
from umm_jax.families.contract import Replier


def seed_of(base: int, asked: str, turn: int) -> int:
    """The seed of one reply, in 32 bits, from nothing but what is asked; `base` may be any integer."""
    return zlib.crc32(f"{base}:{asked}:{turn}".encode())


@dataclass(frozen=True)
class Loaded:
    """A trained model ready to reply.

    Attributes:
        run: the config it was trained by. step: the checkpoint's; weights: "raw" or "ema".
        replier: its family's. parameters: how many numbers it has.
    """

    run: RunConfig
    step: int
    weights: str
    replier: Replier
    parameters: int


def load_run(run_dir: str | Path, step: int | None = None, weights: str | None = None) -> Loaded:
    """Reads config.json, tokenizer.model and a checkpoint of a run.

    Args:
        step: the newest checkpoint unless given.
        weights: "raw", or "ema" for the averaged ones; what the run is judged by unless given.

    Raises:
        CheckpointError: not a run directory, no such checkpoint, or none of averaged weights.
        DataError: its tokenizer cannot be read.
    """
    folder = Path(run_dir)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: no run here (no config.json); train one: umm train --config=FILE --workdir={folder}"
        )
    from umm_jax import families
    from umm_jax.data.tokenizer import Tokenizer
    from umm_jax.train.checkpoint import Checkpoints, load_params
    from umm_jax.train.optimizer import flatten

    weights = weights or configs.load(folder / "config.json").eval.weights
    if step is None:
        step = Checkpoints(folder / "checkpoints", read_only=True).latest()
    run, model_config, params = load_params(folder, weights=weights, step=step)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    replier = families.get(run.family).generate.Replier(model_config, params, tokenizer)
    return Loaded(run, step, weights, replier, sum(leaf.size for leaf in flatten(params).values()))


def load(run_dir: str | Path, step: int | None = None, weights: str | None = None) -> Replier:
    """The Replier of :func:`load_run`."""
    return load_run(run_dir, step, weights).replier
