"""Benchmarks by name, one file each, with a :class:`~umm_jax.evaluate.contract.Task` called TASK.

A new benchmark is a new file here; underscores of its name are hyphens on the command line, and both are
understood. A file that holds several, which differ in nothing but their data, has TASKS instead.
"""

import importlib
import pkgutil

from umm_jax.config import suggest
from umm_jax.errors import ConfigError
from umm_jax.evaluate.contract import Task


def every() -> dict[str, Task]:
    """{name: task} of all there are."""
    found = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        made = importlib.import_module(f"{__name__}.{module.name}")
        for task in getattr(made, "TASKS", None) or [made.TASK]:
            found[task.name] = task
    return found


def get(name: str) -> Task:
    """The task called `name`. Raises ConfigError, with the nearest name, if there is none."""
    tasks = every()
    if (wanted := name.replace("_", "-")) not in tasks:
        raise ConfigError(f"no benchmark is called {name!r}{suggest(wanted, list(tasks))}")
    return tasks[wanted]
