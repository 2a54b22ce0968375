"""Public data sets by name, one file each. A new data set is a new file here; its name is its kind.

    VERSION         raised when the same annotations would give other records
    LICENSE         the terms its authors give (SPDX where there is one); "" where they vary
    Settings        a frozen dataclass of what can be chosen
    entries         (path, settings) -> data.entries.Entries, mostly Entries(path, (names, of, files))
    conversation    (entry, settings, rng, draft): adds the turns of one entry to `draft`

`conversation` gets the values of one entry by name. ``importing.want`` reads them, and ``draft.image`` lets
pictures in. It raises Rejected where the entry is broken and LeftOut where the settings do not want it;
everything else (seeding, naming, counting, quarantine) is done in ``data.importing``. A module that sets
PYTHON_LITERALS gets dicts in single quotes too.
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
