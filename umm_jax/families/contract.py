"""What a family must offer, module by module: all that training, replies, evaluation and tools ask of one.

These are protocols: a family imports nothing from here but :class:`Reply`, and fits by offering the names.
Loads no JAX, so that type hints cost nothing where arrays are not touched.

    config.py      ModelConfig                        -> ModelConfig
    stream.py      Serializer, spec, control_pieces   -> StreamPart, Serializer
    model.py       build(config, rngs)                -> ModelPart, Model (AutoencoderModel)
    generate.py    Replier                            -> GeneratePart, Replier
    weights.py     table, config_of, stock_part, ...  -> WeightsPart
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, ImageData, Turn
from umm_jax.errors import DataError
from umm_jax.stream import Stream, StreamSpec

if TYPE_CHECKING:
    import jax
    import numpy as np
    from flax import nnx

    from umm_jax.weights.hub import Folder, StockPart
    from umm_jax.weights.table import Table

Batch = Mapping[
    str, Mapping[str, "jax.Array"]
]  # {"tokens": {name: [B, T, ...]}, "images": {name: [B, I, ...]}}
Sums = Mapping[str, "jax.Array"]
Pairs = Mapping[str, tuple["jax.Array", "jax.Array"]]


# --- config.py ------------------------------------------------------------------------------------


@runtime_checkable
class ModelConfig(Protocol):
    """The `model` section of a run: a frozen dataclass that ``config.from_dict`` can build.

    It raises ConfigError where its parts do not fit together, and every field has a default: a checkpoint
    saved before a field existed is read with it.
    """

    @property
    def vocab(self) -> int:
        """Rows of the embedding: the most pieces a tokenizer may have."""


class ConfigPart(Protocol):
    ModelConfig: type[ModelConfig]


# --- stream.py: numpy only ------------------------------------------------------------------------


@runtime_checkable
class Serializer(Protocol):
    """Made as ``Serializer(model, tokenizer)``; `model` is the plain section of a config, or a ModelConfig.

    Must be picklable: data workers are given it. Raises DataError for what the family cannot express. One
    whose pictures may be of several sizes also has ``smaller(share)``: itself for that share of their area.
    """

    @property
    def spec(self) -> StreamSpec:
        """The features of every Stream it makes."""

    def __call__(self, conversation: Conversation, rng: "np.random.Generator | None" = None) -> Stream:
        """The whole conversation, with loss where its turns say so.

        What training leaves out at random is drawn from `rng`, and nothing is without one.
        """

    def prompt(self, conversation: Conversation) -> Stream:
        """The conversation and the opening of an assistant turn: what a reply continues."""


class StreamPart(Protocol):
    Serializer: type[Serializer]

    def spec(self, model: Mapping[str, Any] | ModelConfig) -> StreamSpec:
        """The features of the Streams of a model; what a tokenizer has to say of it is left out."""

    def control_pieces(self, model: Mapping[str, Any] | ModelConfig) -> list[str]:
        """The pieces a tokenizer must hold that are never part of a text, in the order of their ids."""


# --- model.py: no files, no flags -----------------------------------------------------------------


@runtime_checkable
class Model(Protocol):
    """An ``nnx.Module``. Both methods name the same parts, one coefficient in ``train.loss`` for each.

    loss = sum over parts of coefficient * sum of numerators / sum of weights, over the whole batch however it
    is cut into microbatches: so numerators must be sums over rows, and weights depend on the data alone.
    """

    def loss_weights(self, batch: Batch) -> Sums:
        """{part: denominator}, scalars."""

    def loss_sums(self, batch: Batch, key: "jax.Array") -> tuple[Sums, Pairs]:
        """({part: numerator}, {metric: (sum, weight)}), scalars; all randomness comes from `key`."""

    def text_likelihood(self, batch: Batch) -> tuple["jax.Array", "jax.Array"]:
        """Of each row the -log p of all text that is learned, and whether greedy decoding gives it: [B], [B].

        As replies are made, not as training is: nothing is left out or made noisy at random.
        """


@runtime_checkable
class AutoencoderModel(Model, Protocol):
    """A model with a module called ``autoencoder``, which ``train.objective="autoencoder"`` trains alone.

    The methods are those of :class:`Model` with the one part "autoencoder".
    """

    def autoencoder_weights(self, batch: Batch) -> Sums: ...

    def autoencoder_sums(self, batch: Batch, key: "jax.Array") -> tuple[Sums, Pairs]: ...


class ModelPart(Protocol):
    def build(self, config: Any, rngs: "nnx.Rngs") -> "Model":
        """The module with fresh parameters, each with logical axis names (see ``models.layers.param``)."""


# --- generate.py ----------------------------------------------------------------------------------


@dataclass
class Reply:
    """An assistant turn, the images it brings by name, and why it ended: "end" or "tokens"."""

    turn: Turn
    images: dict[str, ImageData] = field(default_factory=dict)
    stopped: str = "end"


def check_drawn(conversations: Sequence[Conversation], drawn: "np.ndarray", finite: "np.ndarray") -> None:
    """Raises DataError where a picture that was drawn, bool [B], is not all numbers: bool [B] too."""
    for conversation, here, whole in zip(conversations, drawn, finite):
        if here and not whole:
            raise DataError(
                f"record {conversation.id}: the picture that was drawn is not a number; the checkpoint may "
                "hold such values, or its activations overflow"
            )


@runtime_checkable
class Replier(Protocol):
    """Made as ``Replier(config, params, tokenizer)``.

    One of a family that writes calls and draws nothing itself has an attribute `experts`, too: who makes what
    is asked for, see ``router.replies``.

    Attributes:
        config, serializer: as the family's; what it replies with.
        params: the parameters replies are made with; may be replaced by others of the same shapes, and by
            None while they are in use elsewhere.
    """

    config: Any
    serializer: Serializer
    params: Any

    def reply(
        self,
        conversations: Sequence[Conversation],
        settings: ReplySettings | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Reply]:
        """One reply for each conversation, which depends on it, the settings and its seed alone.

        Raises:
            DataError: a conversation that cannot be answered. ConfigError: settings the model cannot follow.
        """


class GeneratePart(Protocol):
    Replier: type[Replier]


# --- weights.py: the released checkpoints ---------------------------------------------------------


class WeightsPart(Protocol):
    """Names and layouts of the tensors other software reads and writes, for ``umm convert``.

    Attributes:
        ARCHITECTURE: what the ``config.json`` of an export calls the model.
        PARTS: names of the parts that stock classes of other libraries load, for :meth:`stock_part`.
        FOLDER: how the release's folder is laid out where that is not the way of ``transformers``; else None.
    """

    ARCHITECTURE: str
    PARTS: tuple[str, ...]
    FOLDER: "Folder | None"

    def table(self, config: ModelConfig) -> "Table":
        """Rows between the release's tensors and our parameters, complete in both directions.

        Raises:
            ConfigError: the release has no names for a model of this config.
        """

    def release_config(self) -> ModelConfig:
        """The config of the released checkpoint, for one that comes without a file that says."""

    def config_of(
        self, found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> ModelConfig | None:
        """The config of a checkpoint whose ``config.json`` holds `found` and whose tensors have `shapes`.

        Where the release has a FOLDER, `found` is what its config files hold, by key. None where the file is
        not of the reference's kind. Raises CheckpointError where it lacks a value.
        """

    def stock_part(
        self, name: str, config: ModelConfig, found: Mapping[str, tuple[int, ...]] | None = None
    ) -> "StockPart":
        """One of PARTS; `found` are the names and shapes of the stock folder that is read, if one is.

        Raises:
            ConfigError: that part of this model is not laid out like the stock one.
        """
