"""Frozen, validating configuration, built from ``ml_collections`` files and ``--config.a.b=value`` overrides.

A config file is Python with ``get_config()`` returning a ConfigDict; :func:`load` reads it, applies the
overrides and returns a :class:`RunConfig`. Code below the command line sees only these dataclasses.
Imports nothing of ours but the error types, and no JAX, so that launchers can read configs anywhere.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umm_jax.errors import ConfigError

# --- from dictionaries to dataclasses ---------------------------------------------------------------


def suggest(name: str, known: Sequence[str]) -> str:
    """'; did you mean X?' for the nearest of `known`, else the list of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"


def from_dict(cls: type, values: Mapping[str, Any], where: str = "config") -> Any:
    """Builds the frozen dataclass `cls` from nested mappings.

    Raises:
        ConfigError: unknown key (with the nearest known one), missing key, or a value of the wrong type;
            the message carries the dotted path of the key.
    """
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}.{key}: unknown key{suggest(str(key), names)}")
    built = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except TypeError as error:
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.init
            and f.name not in built
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{where}: missing {', '.join(missing)}") from None
        raise ConfigError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        if value not in args:
            options = [str(a) for a in args]
            raise ConfigError(f"{where}: {value!r} is not allowed{suggest(str(value), options)}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a section of keys, got {value!r}")
        return from_dict(hint, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ConfigError(f"{where}: expected {len(args)} values, got {len(value)}")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value)))
    if origin in (dict, Mapping) or hint is dict or (origin and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a section of keys, got {value!r}")
        inner = args[1] if len(args) == 2 else Any
        return {k: _convert(inner, v, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool) or not isinstance(value, hint):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value


def to_dict(config: Any) -> Any:
    """The nested plain-Python form of a config dataclass: what is saved beside a run."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {k: to_dict(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(v) for v in config]
    return config


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Dotted names of the fields in which two configs (dataclasses or plain) differ, with both values."""
    a, b = to_dict(a), to_dict(b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        found = []
        for key in sorted({*a, *b}):
            inner = f"{where}.{key}" if where else str(key)
            if key not in a or key not in b:
                side, value = ("second", b[key]) if key not in a else ("first", a[key])
                found.append(f"{inner}: only in the {side} ({value!r})")
            else:
                found += differences(a[key], b[key], inner)
        return found
    return [] if a == b else [f"{where}: {a!r} != {b!r}"]


# --- the sections of a run ------------------------------------------------------------------------


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, see ``sharding``; -1 takes what is left of the devices (at most one axis)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.tensor, self.sequence)
        if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
            raise ConfigError(f"axis sizes must be positive, with at most one -1; got {sizes}")


@dataclass(frozen=True)
class SourceConfig:
    """One folder of ArrayRecord shards, its weight in the mixture, and how its rows are made.

    Attributes:
        weight: share of the conversations, or where rows are cut, of the rows.
        text_loss: "after_image" learns no text of a conversation before its first image.
        images: the most images of a row; null is data.images. This and the rest are for data.packing=cut.
        cut: what moves to the next row when an image does not fit: everything from the "image" on, or from
            the beginning of its "document" on.
        merge: the share of rows whose documents become one in groups of two to eight.
    """

    path: str
    weight: float = 1.0
    text_loss: typing.Literal["all", "after_image"] = "all"
    images: int | None = None
    cut: typing.Literal["image", "document"] = "image"
    merge: float = 0.0

    def __post_init__(self):
        if self.images is not None and self.images < 1:
            raise ConfigError(f"images must be positive, or null for data.images, it is {self.images}")
        if not 0 <= self.merge <= 1:
            raise ConfigError(f"merge is a share of rows from 0 to 1, it is {self.merge}")


@dataclass(frozen=True)
class DataConfig:
    """What is read and how rows are made.

    Attributes:
        sources: shard folders, mixed by weight. Relative paths are relative to the working directory.
        tokens, images: the budget of one row, on the axes every family has; axes: on those that a family has
            beside them, by name.
        packing: "first_fit" joins several conversations into a row, "none" gives each its own; "cut" lays the
            documents of a source end to end and cuts them into rows, as MM-Interleaved was trained, see
            ``data.cutting``. Rows, not conversations, are then mixed.
        compat: "release" does what MM-Interleaved's released code does where that has a bug: the documents
            that `merge` chose stay apart.
        oversize: what happens to a conversation that exceeds the budget: "refuse" raises, "drop" leaves
            it out and counts it, "truncate" removes the last turns until it fits, "oldest" the oldest
            exchanges that nothing later depends on, "smaller" makes its pictures smaller (for families whose
            pictures are of several sizes). Where rows are cut, only a source whose cut is "document"
            has such: "truncate" then shortens their text.
        licenses: "commercial" refuses folders that hold a record whose licence does not plainly permit
            commercial use, or is not named.
        packing_bins: rows kept open by first-fit.
        align: by axis, where each conversation of a row may begin: at a multiple of this, which divides the
            axis's budget. Blocks of attention that are as long hold one conversation each, and those between
            conversations are skipped.
        batch_size: rows per step over all devices and accumulation steps.
        prefetch: batches prepared ahead by the input thread.
        workers: decoding processes; 0 decodes in the input thread. Where rows are cut, they are divided among
            the sources, one each at least.
    """

    sources: tuple[SourceConfig, ...] = ()
    tokenizer: str = ""
    tokens: int = 128
    images: int = 4
    axes: dict[str, int] = field(default_factory=dict)
    packing: typing.Literal["first_fit", "none", "cut"] = "first_fit"
    compat: typing.Literal["none", "release"] = "none"
    oversize: typing.Literal["refuse", "drop", "truncate", "oldest", "smaller"] = "refuse"
    licenses: typing.Literal["any", "commercial"] = "any"
    packing_bins: int = 8
    align: dict[str, int] = field(default_factory=dict)
    batch_size: int = 16
    shuffle_seed: int = 0
    prefetch: int = 4
    workers: int = 0

    def __post_init__(self):
        if self.batch_size < 1 or min(self.budget.values()) < 1:
            raise ConfigError("batch_size, tokens, images and axes must be positive")
        for axis, multiple in self.align.items():
            if self.packing == "cut":
                raise ConfigError("align is not for rows that are cut")
            if axis not in self.budget or multiple < 1 or self.budget[axis] % multiple:
                room = self.budget.get(axis)
                raise ConfigError(
                    f"align.{axis}={multiple} must divide the budget of a row's axis; "
                    + (f"it is {room}" if room else f"the axes are {', '.join(self.budget)}")
                )
        if self.packing == "cut" and self.oversize in ("oldest", "smaller"):
            raise ConfigError(
                f"oversize={self.oversize} is not for documents that are cut; choose truncate or drop"
            )
        for k, source in enumerate(self.sources):
            if self.packing != "cut" and (source.images, source.cut, source.merge) != (None, "image", 0.0):
                raise ConfigError(f"sources.{k}: images, cut and merge need data.packing=cut")
            if source.images is not None and source.images > self.images:
                raise ConfigError(f"sources.{k}.images {source.images} exceeds data.images {self.images}")

    @property
    def budget(self) -> dict[str, int]:
        """What a row holds, by axis."""
        return {"tokens": self.tokens, "images": self.images, **self.axes}


@dataclass(frozen=True)
class GroupConfig:
    """Parameters whose path ('/'-joined) contains one of `match`; the first group that matches wins.

    Attributes:
        match: substrings of the path; an empty list matches everything.
        optimizer: "adamw", "muon" (matrices and convolution kernels; the rest of the group falls to
            Adam with the same learning rate and is not decayed) or "frozen" (no gradient, no optimizer
            state).
        lr_scale: multiplies the schedule.
        weight_decay: decoupled, times the learning rate.
        decay_vectors: whether parameters of fewer than two dimensions (counted without the layers axis)
            are decayed too.
        no_decay: substrings of the paths that are not decayed whatever their dimensions.
    """

    match: tuple[str, ...] = ()
    optimizer: typing.Literal["adamw", "muon", "frozen"] = "adamw"
    lr_scale: float = 1.0
    weight_decay: float = 0.0
    decay_vectors: bool = False
    no_decay: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptimConfig:
    """Learning-rate schedule, moments and groups.

    Schedule: linear warm-up over `warmup` steps to `lr`, then "constant", "cosine" to 0, or
    "trapezoid": constant, then linear to 0 over the last `decay` fraction of the steps.
    """

    lr: float = 1e-3
    schedule: typing.Literal["constant", "cosine", "trapezoid"] = "cosine"
    warmup: int = 100
    decay: float = 0.35
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_ns_steps: int = 4
    clip: float | None = 1.0
    groups: tuple[GroupConfig, ...] = (GroupConfig(),)

    def __post_init__(self):
        if min(self.lr, self.warmup) < 0 or self.eps <= 0 or self.muon_ns_steps < 1:
            raise ConfigError("lr and warmup must be at least 0, eps and muon_ns_steps positive")
        if not all(0 <= x < 1 for x in (self.b1, self.b2, self.muon_momentum)):
            raise ConfigError(
                f"b1, b2 and muon_momentum are in [0, 1), got {self.b1}, {self.b2}, {self.muon_momentum}"
            )
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay is a share of the steps, 0 to 1, got {self.decay}")
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"clip must be positive, or null for no clipping; it is {self.clip}")


@dataclass(frozen=True)
class BenchmarkConfig:
    """A benchmark that is asked while a run trains.

    Attributes:
        task: of ``umm eval tasks``, one that needs no judge. settings: what differs from its own.
        data_root: folder with its published files; None for tasks of the world.
        limit: only the first docs. reply: what differs from how the run replies.
    """

    task: str
    settings: dict[str, typing.Any] = field(default_factory=dict)
    data_root: str | None = None
    limit: int = 64
    reply: dict[str, typing.Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.limit < 1:
            raise ConfigError(f"limit must be at least 1, it is {self.limit}")


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        steps: optimizer steps.
        accumulate: microbatches per step; divides data.batch_size.
        dtype: dtype of activations; parameters and optimizer state stay float32.
        loss: coefficient of each loss part.
        ema: decay of the averaged weights, or None.
        save_every, keep: checkpoint interval in steps and how many recent ones stay.
        keep_every, keep_best: checkpoints at multiples of so many steps stay for good (0: none), and so do
            the best by eval/NAME of in-training evaluation: "NAME 2" keeps two, "-NAME 1" the least.
        anomaly: what is done where a loss or gradient norm is not finite, see ``train.anomalies``.
        spike: where set, a loss so many standard deviations above those of the last steps is an anomaly too.
        profile: "100:105" writes a profile of these steps to the run's folder; SIGUSR1 asks for five at once.
        hang_minutes: where nothing comes to an end for so long, the process ends with status 75 and leaves in
            the run's folder what every thread was doing; None waits for ever.
        eval_every: steps between in-training evaluations (0: never); eval_items: items per skill of the
            world (0: it is not asked about).
        benchmarks: that are asked then too; their headlines are logged as eval/TASK.
        init_from: run directory whose parameters start this one (by matching path), or "".
        objective: what is trained: "model" (the family's losses) or "autoencoder" (its image autoencoder).
    """

    steps: int = 1000
    seed: int = 0
    accumulate: int = 1
    dtype: typing.Literal["float32", "bfloat16"] = "float32"
    loss: dict[str, float] = field(default_factory=lambda: {"text": 1.0, "image": 1.0})
    ema: float | None = None
    log_every: int = 20
    save_every: int = 200
    keep: int = 2
    keep_every: int = 0
    keep_best: str = ""
    anomaly: typing.Literal["stop", "skip", "rollback"] = "stop"
    spike: float | None = None
    profile: str = ""
    hang_minutes: float | None = 30.0
    eval_every: int = 0
    eval_items: int = 32
    benchmarks: tuple[BenchmarkConfig, ...] = ()
    init_from: str = ""
    objective: typing.Literal["model", "autoencoder"] = "model"

    def __post_init__(self):
        if self.steps < 1 or self.accumulate < 1 or self.log_every < 1 or self.save_every < 1:
            raise ConfigError("steps, accumulate, log_every and save_every must be positive")
        if self.keep < 1:
            raise ConfigError(f"keep must be at least 1, it is {self.keep}")
        if min(self.keep_every, self.eval_every) < 0:
            raise ConfigError("keep_every and eval_every must be 0 or positive")
        if self.eval_items < 0:
            raise ConfigError(f"eval_items must be 0 or positive, it is {self.eval_items}")
        if self.eval_every and not (self.eval_items or self.benchmarks):
            raise ConfigError("eval_every: set eval_items or benchmarks, or there is nothing to evaluate")
        if self.benchmarks and not self.eval_every:
            raise ConfigError("benchmarks are asked during training: set eval_every")
        if self.keep_best and not re.fullmatch(r"-?[^\s-]\S* [1-9]\d*", self.keep_best):
            raise ConfigError(
                f'keep_best: expected a name and a number such as "turns 2"; got {self.keep_best!r}'
            )
        if self.keep_best and not self.eval_every:
            raise ConfigError("keep_best needs in-training evaluation: set eval_every")
        if self.spike is not None and self.spike <= 0:
            raise ConfigError(f"spike must be positive, or null; it is {self.spike}")
        if self.profile and not re.fullmatch(r"\d+:\d+", self.profile):
            raise ConfigError(f'profile: expected steps such as "100:105"; got {self.profile!r}')
        if self.hang_minutes is not None and self.hang_minutes <= 0:
            raise ConfigError(f"hang_minutes must be positive, or null; it is {self.hang_minutes}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema must be between 0 and 1, got {self.ema}")


@dataclass(frozen=True)
class ReplySettings:
    """How a reply is produced.

    Attributes:
        mode: "auto" lets the model choose, "text" forbids images, "image" draws first.
        max_tokens, max_images: bounds of one reply.
        temperature: 0 is greedy; top_p: nucleus mass.
        beams: running texts of a beam search; 1 is none. Its texts are ranked by log-probability over
            length ** length_penalty.
        min_tokens: tokens before a turn may end or an image begin, in each run of text.
        repetition_penalty: above 1, makes what was written in this reply less likely to come again.
        image_steps, guidance: solver steps, and guidance scale (1 is none); None is the model's schedule's.
        image_guidance: scale of guidance by images, where the family has it; None is the model's.
        image_size: (height, width) of what is drawn, where the family can choose; None is the last picture's.
    """

    mode: typing.Literal["auto", "text", "image"] = "auto"
    max_tokens: int = 64
    max_images: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    min_tokens: int = 0
    repetition_penalty: float = 1.0
    image_steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    image_size: tuple[int, int] | None = None

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError("temperature must be >= 0 and top_p in (0, 1]")
        if self.max_tokens < 1 or (self.image_steps is not None and self.image_steps < 1):
            raise ConfigError("max_tokens and image_steps must be at least 1")
        if self.beams < 1 or (self.beams > 1 and self.temperature > 0):
            raise ConfigError(f"beams={self.beams}: at least 1, and a beam search goes with temperature 0")
        if self.min_tokens < 0 or self.min_tokens >= self.max_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens} must be below max_tokens={self.max_tokens}")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty must be positive, it is {self.repetition_penalty:g}")
        if self.max_images < (1 if self.mode == "image" else 0):
            raise ConfigError(f"max_images={self.max_images} does not go with mode={self.mode!r}")


@dataclass(frozen=True)
class EvalConfig:
    """The full evaluation after a run.

    Attributes:
        splits: the first is judged on `items` per skill and `dialogues` dialogues, the others on
            `other_items` of each.
        weights: "ema" needs train.ema.
    """

    splits: tuple[str, ...] = ("iid",)
    items: int = 256
    dialogues: int = 160
    other_items: int = 64
    batch_size: int = 64
    weights: typing.Literal["ema", "raw"] = "raw"
    seed: int = 1_000_003

    def __post_init__(self):
        if not self.splits:
            raise ConfigError("splits: name at least one")
        counts = ("items", "dialogues", "other_items", "batch_size")
        if low := [name for name in counts if getattr(self, name) < 1]:
            raise ConfigError(f"{' and '.join(low)} must be at least 1")


@dataclass(frozen=True)
class WorldSection:
    """The visual-dialogue world a run learns from and is judged in.

    Attributes:
        preset, overrides: a named world and the values changed in it, see ``world.scene.WorldConfig.preset``.
        count: dialogues to synthesize for training.
        after: a config file beside this one whose run comes first and is gone on from; "" is none.
        autoencoder: sections of the config as they differ in a first run that trains the autoencoder alone,
            {section: {field: value}}; empty where there is no such run.
    """

    preset: str = "tiny"
    overrides: dict[str, Any] = field(default_factory=dict)
    count: int = 18000
    after: str = ""
    autoencoder: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        if self.count < 1:
            raise ConfigError(f"count must be at least 1, it is {self.count}")
        if self.after and self.autoencoder:
            raise ConfigError("after and autoencoder each say what training begins from; leave out one")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from. `model` is parsed by the family's own config class."""

    family: str
    model: dict[str, Any]
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    reply: ReplySettings = ReplySettings()
    eval: EvalConfig = EvalConfig()
    world: WorldSection = WorldSection()

    def __post_init__(self):
        if self.eval.weights == "ema" and self.train.ema is None:
            raise ConfigError(
                "config.eval.weights=ema needs averages: set config.train.ema, for example to 0.999"
            )


# --- files and overrides --------------------------------------------------------------------------


def preset(config: Any, presets: Mapping[str, Mapping], word: str | None) -> Any:
    """A config file's ConfigDict, changed as the preset of that name says; unchanged for None."""
    if word is None:
        return config
    if word not in presets:
        raise ConfigError(f"no preset for {word!r}; there are {', '.join(presets)}")
    config.update(presets[word])
    return config


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file (``.py`` with ``get_config()``, or the ``.json`` saved beside a run).

    Args:
        path: ``file.py:word`` gives the word to a ``get_config(word)``, as a preset of it.
        overrides: strings ``a.b=value`` (a leading ``--config.`` is allowed); the value is JSON, or a
            bare string where it is not valid JSON. Tuples take an index: ``optim.groups.0.lr_scale=2``.
    """
    file, colon, word = str(path).rpartition(".py:")
    path = Path(f"{file}.py" if colon else path)
    if not path.exists():
        raise ConfigError(f"{path}: no such config file")
    if path.suffix == ".json":
        try:
            raw = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}: not valid JSON ({error})") from None
    else:
        spec = importlib.util.spec_from_file_location("umm_config", path)
        if spec is None:
            raise ConfigError(f"{path}: a config file ends in .py or .json")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise ConfigError(f"{path}: has no get_config()")
        if colon and not inspect.signature(module.get_config).parameters:
            raise ConfigError(f"{path}: its get_config() takes no word, so leave out ':{word}'")
        if not colon and _needs_a_word(module.get_config):
            raise ConfigError(f"{path}: its get_config needs a word, as in {path}:WORD")
        raw = module.get_config(word) if colon else module.get_config()
        raw = raw.to_dict() if hasattr(raw, "to_dict") else raw
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{path}: a config is a mapping, this is a {type(raw).__name__}")
    try:
        raw = json.loads(json.dumps(raw))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: a config holds what JSON can: {error}") from None
    # Overrides are checked against the completed tree, so that defaults can be overridden too.
    complete = to_dict(from_dict(RunConfig, raw))
    for text in overrides:
        override(complete, text)
    return from_dict(RunConfig, complete)


def _needs_a_word(function: typing.Callable) -> bool:
    return any(p.default is p.empty for p in inspect.signature(function).parameters.values())


# Fields that hold names of their own: checked by whom they are for, and a name may be absent because it has
# its default.
_OPEN = (
    ("model",),
    ("data", "axes"),
    ("data", "align"),
    ("train", "loss"),
    ("world", "overrides"),
    ("world", "autoencoder"),
)


def override(tree: dict, text: str) -> None:
    """Sets in place what ``--config.a.b=value`` says of a complete config. Raises ConfigError."""
    text = text.removeprefix("--").removeprefix("config.")
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{text!r}: an override is written --config.a.b=value")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = {"True": True, "False": False, "None": None}.get(value, value)
    node, keys = tree, name.split(".")
    for i, key in enumerate(keys):
        where = "config." + ".".join(keys[: i + 1])
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise ConfigError(f"{where}: expected an index below {len(node)}")
            key = int(key)
        elif not isinstance(node, dict):
            raise ConfigError(f"{where}: there is nothing below {'.'.join(keys[:i])}")
        elif key not in node:
            if not any(tuple(keys[: len(name)]) == name for name in _OPEN):
                raise ConfigError(f"{where}: unknown key{suggest(key, list(node))}")
            node[key] = {}
        if i == len(keys) - 1:
            node[key] = parsed
        else:
            node = node[key]


def save(config: RunConfig, path: str | Path) -> None:
    """Writes the resolved config as JSON beside the run."""
    Path(path).write_text(json.dumps(to_dict(config), indent=1) + "\n")
