"""The Stream: one conversation laid out for one family, as named arrays along a few axes.

A family's serializer turns a Conversation into a Stream (numpy only); packing joins several Streams into
one row of fixed size; rows are stacked into a Batch. Nothing between the serializer and the model needs
to know what the features mean: each :class:`Feature` says how to pad it, and whether its values are
indices into one of the axes, which must move when Streams are laid end to end.

    Stream   {"tokens": {name: [t, ...]}, "images": {name: [i, ...]}}
    Row      the same with t -> T and i -> I, plus "segment_ids" and "positions" on every axis
    Batch    rows stacked: [B, T, ...] and [B, I, ...]

Every family has the axes tokens and images; it may have more, each with a budget of its own in a row.
``segment_ids`` is 0 on padding and 1, 2, ... for the first, second, ... conversation of a row, the same
number on all axes; ``positions`` counts from 0 inside each conversation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from umm_jax.errors import ConfigError


@dataclass(frozen=True)
class Feature:
    """One named array of a Stream.

    Attributes:
        shape: shape after the token or image axis.
        dtype: numpy dtype name.
        pad: value on padding.
        refers: name of an axis when values are indices into that axis of the same Stream; negative values
            mean "none" and are never shifted.
        loss: values are the weights of a loss on that token; 0 learns nothing.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "int32"
    pad: float = 0
    refers: str | None = None
    loss: bool = False


@dataclass(frozen=True)
class StreamSpec:
    """The features of a family's Streams, by axis.

    Attributes:
        more: further axes, {axis: {feature: ...}}.
        delimiters: (token feature, value that opens a Stream, value that closes a document): tokens that only
            say where one document ends and the next begins, and go where several become one.
    """

    tokens: Mapping[str, Feature] = field(default_factory=dict)
    images: Mapping[str, Feature] = field(default_factory=dict)
    more: Mapping[str, Mapping[str, Feature]] = field(default_factory=dict)
    delimiters: tuple[str, int, int] | None = None

    def __post_init__(self):
        for axis, features in self.axes.items():
            for name, feature in features.items():
                if feature.refers is not None and feature.refers not in self.axes:
                    raise ValueError(f"{axis}/{name} refers to {feature.refers!r}, no axis of {[*self.axes]}")

    @property
    def axes(self) -> dict[str, Mapping[str, Feature]]:
        """{axis: {feature: ...}} of all axes, tokens and images first."""
        return {"tokens": self.tokens, "images": self.images, **self.more}


Stream = dict[str, dict[str, np.ndarray]]


def stream_length(stream: Stream) -> dict[str, int]:
    """{"tokens": t, "images": i, ...} of a Stream."""
    return {axis: len(next(iter(features.values()))) for axis, features in stream.items()}


def check_stream(stream: Stream, spec: StreamSpec) -> None:
    """Raises ValueError when names, lengths, shapes or dtypes differ from `spec`."""
    if set(stream) != set(spec.axes):
        raise ValueError(f"axes {sorted(stream)}, spec says {sorted(spec.axes)}")
    for axis, features in spec.axes.items():
        if set(stream[axis]) != set(features):
            raise ValueError(f"{axis}: features {sorted(stream[axis])}, spec says {sorted(features)}")
        lengths = {len(a) for a in stream[axis].values()}
        if len(lengths) > 1:
            raise ValueError(f"{axis}: features of unequal length {sorted(lengths)}")
        for name, feature in features.items():
            array = stream[axis][name]
            if array.shape[1:] != feature.shape or array.dtype != np.dtype(feature.dtype):
                raise ValueError(
                    f"{axis}/{name}: {array.dtype}{list(array.shape[1:])} per item, "
                    f"spec says {feature.dtype}{list(feature.shape)}"
                )


def is_piece(text: str) -> bool:
    """Whether a delimiter is one piece of a tokenizer, such as ``<user>``, and not words like any other."""
    return text.startswith("<") and text.endswith(">")


def rounded_up(value: int, multiple: int) -> int:
    """The next multiple: rows of few lengths need few programs."""
    return -(-value // multiple) * multiple


def beyond(pieces: int, vocab: int, option: str) -> np.ndarray:
    """True for the ids of a vocabulary that no piece of the tokenizer has: bool [vocab].

    Raises:
        ConfigError: more pieces than the vocabulary holds; `option` is what sets its size.
    """
    if pieces > vocab:
        raise ConfigError(
            f"the tokenizer has {pieces} pieces, the model's vocabulary holds {vocab}; set {option} "
            "at least as high"
        )
    return np.arange(vocab) >= pieces
