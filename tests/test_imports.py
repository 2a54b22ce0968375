"""The import laws of the package, read from the source without running it.

Who may import whom is the table ROOMS; the rest are the laws on what the rooms may know of the outside.
"""

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "umm_jax"

BASE = {"errors", "config", "stream", "conversation", "versions"}
# A room is a file or folder directly below umm_jax. Each may import itself and what stands beside it.
ROOMS = {
    "__init__": set(),
    "errors": set(),
    "config": {"errors"},
    "stream": {"errors"},
    "conversation": {"errors"},
    "compiler": set(),
    "processes": {"errors"},
    "versions": set(),
    "sharding": {"errors", "config"},
    "models": {"errors", "config", "sharding"},
    "weights": {"errors"},
    "markup": {"errors", "config", "conversation"},
    "families": BASE | {"models", "sharding", "compiler", "weights", "markup"},
    "world": {"errors", "config", "conversation", "markup"},
    "data": BASE | {"markup"},
    "train": BASE | {"sharding", "compiler", "models", "families", "world", "data"},
    "generate": BASE | {"sharding", "models", "families", "data", "train"},
    "plan": BASE | {"sharding", "compiler", "models", "families", "data", "train", "generate"},
    "router": BASE | {"sharding", "models", "families", "markup", "data", "train", "generate"},
    "evaluate": BASE
    | {"sharding", "models", "families", "markup", "world", "data", "train", "generate", "router"},
    "convert": BASE | {"sharding", "compiler", "models", "weights", "families", "data", "train", "generate"},
    "launch": {"errors", "plan", "data"},
    "serve": BASE | {"sharding", "models", "families", "markup", "data", "train", "generate", "router"},
}
ROOMS["demo"] = {"config", "evaluate"}
ROOMS["cli"] = {*ROOMS} - {"__init__"}
USES = ("generate", "router", "evaluate", "convert", "serve")

EXTRAS = (
    "torch",
    "transformers",
    "diffusers",
    "tensorflow",
    "tensorflow_datasets",
    "gradio",
    "apache_beam",
    "wandb",
)
ACCELERATED = ("jax", "jaxlib", "flax", "optax", "orbax")
MESH_NAMES = (
    "Mesh",
    "AbstractMesh",
    "NamedSharding",
    "PartitionSpec",
    "AxisType",
    "make_mesh",
    "set_mesh",
    "use_mesh",
)
# Kernel adapters that may reach into private JAX, each guarded and commented in its file.
PRIVATE_JAX = ()


@dataclass(frozen=True)
class Import:
    """One imported name: `name` is the full dotted path, `top` whether it runs when the module loads."""

    module: str
    name: str
    line: int
    top: bool


def imports(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Every import of a file, relative ones resolved; ``from a import b`` gives ``a.b``."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found = []

    def visit(node: ast.AST, top: bool):
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            found.extend(Import(module, ".".join([*base, a.name]), node.lineno, top) for a in node.names)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, top and not inside)

    visit(ast.parse(source), True)
    return found


def room(name: str) -> str:
    """The room of a dotted name below umm_jax ("umm_jax.data.x" -> "data")."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path) -> list[Import]:
    return imports(path.read_text(), module, path.name == "__init__.py")


def starts(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


# --- the laws: each takes one import and says what is wrong with it, or None --------------------------


def upward(i: Import) -> str | None:
    if not starts(i.name, ("umm_jax",)):
        return None
    here, there = room(i.module), room(i.name)
    # "from umm_jax import __version__" and the like reach the top file only.
    if there == here or there not in ROOMS or there == "__init__":
        return None
    return None if there in ROOMS[here] else f"{here} may not import {there}"


def loop_is_private(i: Import) -> str | None:
    if room(i.module) in USES and starts(i.name, ("umm_jax.train.loop",)):
        return "the uses of a trained model never import train.loop"
    return None


def pure_models(i: Import) -> str | None:
    pure = room(i.module) == "models" or (room(i.module) == "families" and i.module.endswith(".model"))
    unknown = (
        "os",
        "io",
        "pathlib",
        "shutil",
        "argparse",
        "absl",
        "orbax",
        "grain",
        "array_record",
        "ml_collections",
    )
    if pure and starts(i.name, unknown):
        return "models know no files, flags, Orbax or Grain"
    return None


def numpy_only(i: Import) -> str | None:
    plain = room(i.module) in ("data", "world", "markup", "conversation", "config", "stream", "errors")
    stream = room(i.module) == "families" and i.module.endswith((".stream", "families"))
    if (plain or stream) and starts(i.name, ACCELERATED):
        return "numpy and bytes only here, no JAX"
    return None


def one_mesh(i: Import) -> str | None:
    if i.module == "umm_jax.sharding":
        return None
    if starts(i.name, ("jax.sharding", "jax.make_mesh", "jax.set_mesh", "jax.experimental.mesh_utils")):
        return "only umm_jax.sharding touches mesh types"
    return None


def extras_are_lazy(i: Import) -> str | None:
    return "an optional package is imported inside a function" if i.top and starts(i.name, EXTRAS) else None


def public_jax(i: Import) -> str | None:
    if starts(i.name, ("jax._src", "jaxlib")) and i.module not in PRIVATE_JAX:
        return "private JAX modules change without notice"
    return None


LAWS = (upward, loop_is_private, pure_models, numpy_only, one_mesh, extras_are_lazy, public_jax)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law):
    broken = [
        f"{path.relative_to(ROOT)}:{i.line}: imports {i.name}: {problem}"
        for module, path in modules().items()
        for i in imports_of(module, path)
        if (problem := law(i))
    ]
    assert not broken, "\n".join(broken)


def test_every_room_has_its_row():
    present = {room(module) for module in modules()}
    assert present <= set(ROOMS), f"rooms without a row in ROOMS: {sorted(present - set(ROOMS))}"


def mesh_attributes(source: str) -> list[str]:
    """Uses such as ``jax.sharding.Mesh`` or ``jax.make_mesh`` that need no import of their own."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr in MESH_NAMES
        and ast.unparse(node.value) in ("jax", "jax.sharding")
    ]


def test_only_sharding_names_mesh_types():
    broken = [
        f"{path.relative_to(ROOT)}:{use}"
        for module, path in modules().items()
        if module != "umm_jax.sharding"
        for use in mesh_attributes(path.read_text())
    ]
    assert not broken, "\n".join(broken)


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """A path of modules that ends where it began, if there is one."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for after in sorted(graph[node]):
            if found := walk(after, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in graph if (found := walk(node, []))), None)


def test_no_circles():
    known = modules()

    def target(name: str) -> str | None:
        """The module a dotted name comes from: itself, or the one it is an attribute of."""
        while name and name not in known:
            name = name.rpartition(".")[0]
        return name or None

    graph = {
        # A module that names its own package (for a neighbour) does not depend on the package's __init__.
        module: {t for i in imports_of(module, path) if i.top and (t := target(i.name)) and t != module}
        for module, path in known.items()
    }
    found = cycle(graph)
    assert found is None, " -> ".join(found)


# --- what is promised about loading, seen from a fresh interpreter ------------------------------------


def loaded(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_a_stream_loads_without_jax():
    got = loaded("from umm_jax import families; families.get('mm_interleaved').stream.Serializer")
    assert "umm_jax.families.mm_interleaved.stream" in got
    assert not got & {"jax", "flax", "tensorflow"}


def test_the_command_line_starts_without_jax():
    assert not loaded("import umm_jax.cli") & {"jax", "flax", "numpy", "grain", "tensorflow"}


# --- the checks themselves can fail -------------------------------------------------------------------


@pytest.mark.parametrize(
    "law, module, source",
    [
        (upward, "umm_jax.models.x", "from umm_jax.train import step"),
        (upward, "umm_jax.world.x", "from .. import data"),
        (loop_is_private, "umm_jax.evaluate.x", "from umm_jax.train.loop import train"),
        (pure_models, "umm_jax.families.f.model", "from pathlib import Path"),
        (numpy_only, "umm_jax.data.records", "import jax.numpy as jnp"),
        (numpy_only, "umm_jax.families.f.stream", "def f():\n  from flax import nnx"),
        (one_mesh, "umm_jax.train.step", "from jax.sharding import Mesh"),
        (extras_are_lazy, "umm_jax.convert.x", "import torch.nn"),
        (public_jax, "umm_jax.models.x", "from jax._src import core"),
    ],
)
def test_the_law_sees_a_breach(law, module, source):
    assert any(law(i) for i in imports(source, module))


def test_the_checks_let_the_innocent_pass():
    assert not any(extras_are_lazy(i) for i in imports("def f():\n  import torch", "umm_jax.convert.x"))
    assert not any(upward(i) for i in imports("from umm_jax.config import load", "umm_jax.models.x"))


def test_a_circle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_a_mesh_by_attribute_is_found():
    assert mesh_attributes("import jax\nm = jax.sharding.Mesh(d, 'x')\nn = jax.make_mesh((1,), ('x',))")
    assert not mesh_attributes("import jax\nx = jax.numpy.zeros(3)")
