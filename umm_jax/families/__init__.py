"""Model families by name. A family is a folder here; its parts load when they are asked for.

``families.get("mm_interleaved")`` imports nothing but the (empty) package of the family, so that a data
worker that reads ``.stream`` never loads JAX. A new family is a new folder with the same five files:

    config.py      ModelConfig, a frozen dataclass
    stream.py      Serializer: Conversation -> Stream (numpy only); control_pieces of its tokenizer
    model.py       build(config, rngs) -> nnx.Module
    generate.py    Replier: conversations -> replies
    weights.py     table(config) and what else stands between us and released checkpoints

What each must offer is written down in ``contract.py``.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import TYPE_CHECKING

from umm_jax.config import suggest
from umm_jax.errors import ConfigError

if TYPE_CHECKING:
    from umm_jax.families import contract

PARTS = ("config", "stream", "model", "generate", "weights")


class Family:
    """Namespace of one family's modules, ``family.config`` and so on, each loaded when asked for."""

    config: "contract.ConfigPart"
    stream: "contract.StreamPart"
    model: "contract.ModelPart"
    generate: "contract.GeneratePart"
    weights: "contract.WeightsPart"

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, part: str) -> ModuleType:
        if part not in PARTS:
            raise AttributeError(f"family {self.name!r} has no part {part!r}; it has {', '.join(PARTS)}")
        module = importlib.import_module(f"{__name__}.{self.name}.{part}")
        setattr(self, part, module)
        return module

    def __repr__(self) -> str:
        return f"<family {self.name}>"


def names() -> list[str]:
    """The families there are: the folders beside this file."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)


def get(name: str) -> Family:
    """The family called `name`.

    Raises:
        ConfigError: there is none of that name; the message carries the nearest one.
    """
    if name not in names():
        raise ConfigError(f"family {name!r} is unknown{suggest(name, names())}")
    return Family(name)
