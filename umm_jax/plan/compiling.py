"""Has the steps of a config compiled in a process of its own, once: what was compiled before is kept.

libtpu takes over a process that loads it, so it is never loaded here: the child gets an environment in which
JAX runs on the CPU and libtpu only compiles.
"""

import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umm_jax import config as configs
from umm_jax.config import RunConfig
from umm_jax.errors import ConfigError, DeviceError, UserError
from umm_jax.plan import hlo
from umm_jax.plan.chips import Topology

# What says how long, how often and where a run goes, and not what is compiled.
_NOT_COMPILED = ("eval", "reply", "world")
_NOT_OF_DATA = ("sources", "tokenizer", "workers", "prefetch", "shuffle_seed", "licenses")
_NOT_OF_TRAINING = (
    "init_from",
    "log_every",
    "save_every",
    "keep",
    "keep_every",
    "keep_best",
    "spike",
    "profile",
    "hang_minutes",
    "eval_every",
    "eval_items",
)


@dataclass(frozen=True)
class Compiled:
    """What is known of one program.

    Attributes:
        facts: what the compiler said, see ``child.py``. work: model FLOPs, {part: {"forward", "backward"}}.
        program: its text, read; None where it was refused for its memory.
        cached: whether it was compiled before.
    """

    facts: dict[str, Any]
    work: dict[str, dict[str, float]]
    program: hlo.Program | None
    cached: bool


def cache_folder() -> Path:
    """Where compiled programs are kept: ``$UMM_PLAN_CACHE``, or below the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("UMM_PLAN_CACHE") or Path(base) / "umm_jax" / "plan")


def compiled(run: RunConfig, topology: Topology | None, *, quick: bool = False) -> Compiled:
    """The training step of `run` for a topology, or for the devices of this machine where it is None.

    Args:
        quick: the compiler searches less: several times faster, for a slower program of much the same memory.

    Raises:
        DeviceError: no libtpu to compile for a TPU with.
        ConfigError: what the config itself is refused for.
        UserError: the compiler failed for another reason than memory.
    """
    if topology is not None:
        require_libtpu()
    request = {
        "config": configs.to_dict(run),
        "topology": topology and topology.name,
        "slices": topology.slices if topology else 1,
        "quick": quick,
    }
    folder = cache_folder() / _key(request)
    known = folder.is_dir()
    if not known:
        _compile(request, folder)
    facts = json.loads((folder / "train.json").read_text())
    work = json.loads((folder / "work.json").read_text())
    program = None
    if "error" not in facts:
        with gzip.open(folder / "train.txt.gz", "rt") as file:
            program = hlo.parse(file.read())
    elif "needs" not in facts:
        shutil.rmtree(folder)  # it may be the machine's fault, and compile another time
        raise UserError(f"the compiler refused the program: {facts['error'].strip().splitlines()[0]}")
    return Compiled(facts, work, program, known)


def require_libtpu() -> None:
    """Raises DeviceError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise DeviceError(
            "compiling for a TPU needs libtpu (no TPU is needed): make setup-plan, or pip install "
            "'umm_jax[plan]'; --topology=local plans for the devices of this machine"
        )


def _key(request: dict[str, Any]) -> str:
    """Of all that a program depends on: the request, the code, the versions."""
    config = {k: v for k, v in request["config"].items() if k not in _NOT_COMPILED}
    config["data"] = {k: v for k, v in config["data"].items() if k not in _NOT_OF_DATA}
    config["train"] = {k: v for k, v in config["train"].items() if k not in _NOT_OF_TRAINING}
    versions = [importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "optax")]
    if request["topology"]:
        versions.append(importlib.metadata.version("libtpu"))
    asked = [request[name] for name in ("topology", "slices", "quick")]
    # What else a compiler goes by, and for the devices here, where that is.
    child = environment(request["topology"] is not None)
    flags = {k: v for k, v in child.items() if k.startswith(("JAX_", "XLA_", "LIBTPU_"))}
    if request["topology"] is None:
        flags |= {"host": platform.node(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES", "")}
    said = json.dumps([config, asked, versions, flags, _code()], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:24]


def _code() -> str:
    """A digest of the files a program is traced from."""
    root, digest = Path(__file__).resolve().parent.parent, hashlib.sha256()
    rooms = ("models", "families", "train", "plan", "data/packing.py")
    rooms += ("sharding.py", "compiler.py", "config.py", "stream.py")
    for room in rooms:
        for path in sorted((root / room).rglob("*.py")) if (root / room).is_dir() else [root / room]:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def environment(tpu: bool) -> dict[str, str]:
    """What the child runs in."""
    found = dict(os.environ)
    if tpu:
        # No accelerator is looked for; two that compile at a time do not stop each other.
        found |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        found.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
        found |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    root = str(Path(__file__).resolve().parent.parent.parent)
    found["PYTHONPATH"] = os.pathsep.join(filter(None, (root, found.get("PYTHONPATH"))))
    return found


def _compile(request: dict[str, Any], folder: Path) -> None:
    """Fills `folder`; what is there is whole, or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        (part / "request.json").write_text(json.dumps(request, indent=1))
        done = subprocess.run(
            [sys.executable, "-m", "umm_jax.plan.child", str(part / "request.json"), str(part)],
            env=environment(request["topology"] is not None),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            raise _failure(done)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _failure(done: subprocess.CompletedProcess) -> UserError:
    """The error of a child as one of ours: its own words where it has any for a user."""
    lines = done.stderr.strip().splitlines() or ["nothing was said"]
    kinds = {kind.__name__: kind for kind in (ConfigError, DeviceError)}
    for line in reversed(lines):
        before, _, message = line.partition(": ")
        if (kind := kinds.get(before.rsplit(".", 1)[-1])) and message:
            return kind(message)
    if done.returncode < 0:
        return UserError(f"the compiler was killed (signal {-done.returncode}): is there memory enough?")
    return UserError(f"the compiler failed: {lines[-1]}")
