"""TPU chips and how they are put together: what a topology's name means, before anything is compiled."""

import math
import re
from dataclasses import dataclass

from umm_jax.config import suggest
from umm_jax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What an estimate needs of a chip; one chip is one device.

    Attributes:
        peak: bfloat16 FLOP/s. memory: bytes of HBM. bandwidth: of it, bytes/s.
        clock: cycles/s that the compiler's estimates are divided by.
        cores: each with a vector unit that is taken to have 1024 lanes by four.
        links: bytes/s to other chips of the slice, all links together.
        network: bytes/s to other slices, a chip's share of the data-centre network; None is not published.
        dims: of its topologies. largest: chips of a slice.
    """

    name: str
    peak: float
    memory: int
    bandwidth: float
    clock: float
    cores: int
    links: float
    network: float | None
    dims: int
    largest: int

    @property
    def vector(self) -> float:
        """Operations/s of the vector units on 32-bit numbers."""
        return self.cores * 4096 * self.clock


# Peak, memory, bandwidth, links and network as Google's pages of Cloud TPU versions say them (network of v5e
# and v6e: that of a pod of 256 chips, shared). Clocks: v5e and v5p from
# peak and number of matrix units; v6e inferred, as a large product then runs at 97 % of the peak. Only v5p
# and v6e have been held against published steps.
CHIPS = {
    "v4": Chip("v4", 275e12, 32 * GIB, 1.2e12, 1.05e9, 2, 300e9, None, 3, 4096),
    "v5e": Chip("v5e", 197e12, 16 * GIB, 0.82e12, 1.5e9, 1, 200e9, 3.125e9, 2, 256),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2.765e12, 1.75e9, 2, 600e9, 6.25e9, 3, 8960),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1.64e12, 1.75e9, 1, 448e9, 12.5e9, 2, 256),
}


@dataclass(frozen=True)
class Topology:
    """Slices of chips, such as two of v5e:4x4."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As the compiler calls one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def accelerator(self) -> str:
        """As Cloud TPU calls the kind and size of one slice: v4 and v5p count cores, two a chip."""
        chips = math.prod(self.shape)
        prefix, each = {"v4": ("v4", 2), "v5p": ("v5p", 2), "v5e": ("v5litepod", 1), "v6e": ("v6e", 1)}[
            self.chip.name
        ]
        return f"{prefix}-{chips * each}"

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Which dimensions close to a ring, of three whatever the shape.

        Without rings the compiler gathers by adding, at twice the cost.

        Cubes of v4 and v5p do where every side is a multiple of four; a side of v5e and v6e where it is 16.
        """
        if self.chip.dims == 3:
            return (all(side % 4 == 0 for side in self.shape),) * 3
        x, y = self.shape
        return x == 16, y == 16, False

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def topology(name: str, slices: int = 1) -> Topology:
    """What a name such as ``v5p:4x4x4`` means.

    Raises:
        ConfigError: an unknown chip, a shape of other than its dimensions or of too many chips, or no
            number of slices.
    """
    examples = "v5e:4x4, v5p:4x4x4, v6e:16x16"
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found:
        raise ConfigError(f"topology {name!r}: write CHIP:SHAPE, such as {examples}")
    if found[1] not in CHIPS:
        raise ConfigError(
            f"topology {name!r}: chip {found[1]!r} is unknown{suggest(found[1], list(CHIPS))}; "
            f"there are {', '.join(CHIPS)}"
        )
    chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if len(shape) != chip.dims:
        kind = "x".join("XYZ"[: chip.dims])
        raise ConfigError(
            f"topology {name!r}: slices of {chip.name} have the shape {kind}, such as {examples}"
        )
    if min(shape) < 1 or math.prod(shape) > chip.largest:
        raise ConfigError(f"topology {name!r}: a slice of {chip.name} has 1 to {chip.largest} chips")
    if slices < 1:
        raise ConfigError(f"slices must be at least 1, it is {slices}")
    return Topology(chip, shape, slices)
