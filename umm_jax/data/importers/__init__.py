"""Public data sets by name, one file each. A new data set is a new file here; its name is its --kind.

    PATTERNS     names of its annotation files, for where a folder is given
    VERSION      raised when the same annotations would give other records
    Settings     a frozen dataclass of what can be chosen
    document     (entry, settings, rng, pictures) -> texts and pictures in their order, or None

An entry is one line of the annotations, read as JSON; `pictures.see(name)` reads a picture. What is left out
is counted in `pictures.left_out`. Everything else (finding, reading, seeding) is done in ``data.importing``.
"""

import importlib
import pkgutil
from types import ModuleType

from umm_jax.config import suggest
from umm_jax.errors import ConfigError


def names() -> list[str]:
    """The data sets there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(kind: str) -> ModuleType:
    """The importer called `kind`. Raises ConfigError, with the nearest name, if there is none."""
    if kind not in names():
        raise ConfigError(f"no importer is called {kind!r}{suggest(kind, names())}")
    return importlib.import_module(f"{__name__}.{kind}")
