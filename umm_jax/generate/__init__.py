"""From a run directory to replies: ``load("runs/demo").reply([conversation], settings, seeds)``."""

import functools
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umm_jax import config as configs
from umm_jax.config import ReplySettings, RunConfig
from umm_jax.conversation import Conversation
from umm_jax.errors import CheckpointError
from umm_jax.families.contract import Replier, Reply

if TYPE_CHECKING:
    from umm_jax.generate.likelihood import Likelihood


def seed_of(base: int, asked: str, turn: int) -> int:
    """The seed of one reply, in 32 bits, from nothing but what is asked; `base` may be any integer."""
    return zlib.crc32(f"{base}:{asked}:{turn}".encode())


@dataclass(frozen=True)
class Loaded:
    """A trained model ready to reply, and to say how probable it finds given replies.

    Attributes:
        run: the config it was trained by. step: the checkpoint's; weights: "raw" or "ema".
        replier: its family's. parameters: how many numbers it has. fingerprint: see :class:`Identity`.
    """

    run: RunConfig
    step: int
    weights: str
    replier: Replier
    parameters: int
    fingerprint: str = ""

    def reply(
        self,
        conversations: Sequence[Conversation],
        settings: ReplySettings | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        """See ``families.contract.Replier``."""
        return self.replier.reply(conversations, settings, seeds)

    def score(self, conversation: Conversation, options: Sequence[str]) -> tuple[float, ...]:
        """The log-probability of each option as the whole reply, see ``likelihood.Likelihood``."""
        return tuple(likely.logprob for likely in self.likelihood(conversation, options))

    @functools.cached_property
    def likelihood(self) -> "Likelihood":
        from umm_jax.generate.likelihood import Likelihood

        return Likelihood(self.run.family, self.replier)


@dataclass(frozen=True)
class Identity:
    """What tells a trained model from others, found without loading it.

    Attributes:
        run: its config. folder: of the run. step: the checkpoint's; weights: "raw" or "ema".
        overrides: of its config, see :func:`load_run`.
        fingerprint: hash of the checkpoint's files by name, size and, where they are small, content; of the
            tokenizer; of weights, overrides and the run's world. A copy of a run has that of the run.
    """

    run: RunConfig
    folder: str
    step: int
    weights: str
    overrides: tuple[str, ...]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for records."""
        said = {name: getattr(self, name) for name in ("folder", "step", "weights", "fingerprint")}
        return said | {"family": self.run.family, "overrides": list(self.overrides)}


_WHOLE = 1 << 16  # files of at most so many bytes go into a fingerprint with all they hold


def identify(
    run_dir: str | Path,
    step: int | None = None,
    weights: str | None = None,
    overrides: Sequence[str] = (),
) -> Identity:
    """What :func:`load_run` of the same arguments would load, and raises the same."""
    from umm_jax.train.checkpoint import Checkpoints

    folder = Path(run_dir)
    run = configs.load(_config(folder), list(overrides))
    weights = weights or run.eval.weights
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    step = checkpoints.latest() if step is None else step
    if step not in checkpoints.steps():
        has = ", ".join(map(str, checkpoints.steps())) or "none"
        raise CheckpointError(f"{folder}: no checkpoint of step {step}; there are: {has}")
    fingerprint = _fingerprint(folder, run, step, weights, overrides)
    return Identity(run, str(run_dir), step, weights, tuple(overrides), fingerprint)


def _fingerprint(folder: Path, run: RunConfig, step: int, weights: str, overrides: Sequence[str]) -> str:
    """See :class:`Identity`."""
    world = configs.to_dict(run.world)
    told = hashlib.sha256(f"{weights} {sorted(overrides)} {world}\n".encode())
    saved = folder / "checkpoints" / str(step)
    for path in (folder / "tokenizer.model", *sorted(saved.rglob("*"))):
        if path.is_file():
            size = path.stat().st_size
            told.update(f"{path.relative_to(folder)} {size}\n".encode())
            told.update(path.read_bytes() if size <= _WHOLE else b"")
    return told.hexdigest()[:16]


def _config(folder: Path) -> Path:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no run here (no config.json); train one: umm train --config=FILE --workdir={folder}"
        )
    return path


def load_run(
    run_dir: str | Path,
    step: int | None = None,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    devices: int | None = None,
) -> Loaded:
    """Reads config.json, tokenizer.model and a checkpoint of a run.

    Args:
        step: the newest checkpoint unless given.
        weights: "raw", or "ema" for the averaged ones; what the run is judged by unless given.
        overrides: ``--config.a.b=VALUE``, of how it replies; of its model, what no parameter depends on.
        devices: of this process, which hold a part of the parameters each; all of them unless given.

    Raises:
        CheckpointError: not a run directory, no such checkpoint, or none of averaged weights.
        ConfigError: overrides. DataError: its tokenizer cannot be read. DeviceError: fewer devices.
    """
    folder = Path(run_dir)
    run = configs.load(_config(folder), list(overrides))
    import jax

    from umm_jax import families, sharding
    from umm_jax.data.tokenizer import Tokenizer
    from umm_jax.train.checkpoint import Checkpoints, load_params
    from umm_jax.train.optimizer import flatten

    held = jax.local_devices()[:devices]
    mesh = sharding.make_mesh(configs.MeshConfig(1, devices or len(held), 1), held)
    weights = weights or run.eval.weights
    if step is None:
        step = Checkpoints(folder / "checkpoints", read_only=True).latest()
    _, model_config, params = load_params(folder, mesh=mesh, weights=weights, step=step)
    model_config = _overridden(model_config, overrides)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    replier = families.get(run.family).generate.Replier(model_config, params, tokenizer)
    parameters = sum(leaf.size for leaf in flatten(params).values())
    fingerprint = _fingerprint(folder, run, step, weights, overrides)
    return Loaded(run, step, weights, replier, parameters, fingerprint)


def _overridden(model_config: Any, overrides: Sequence[str]) -> Any:
    """A saved model's config, and of it what the overrides say of ``config.model``."""
    of_model = [o for o in overrides if o.startswith("--config.model.")]
    if not of_model:
        return model_config
    changed = {"model": configs.to_dict(model_config)}
    for text in of_model:
        configs.override(changed, text)
    return configs.from_dict(type(model_config), changed["model"], "config.model")


def load(run_dir: str | Path, step: int | None = None, weights: str | None = None) -> Replier:
    """The Replier of :func:`load_run`."""
    return load_run(run_dir, step, weights).replier
