"""Where arrays lie. The only file that makes a mesh, and the only one that knows mesh axes.

Models name the dimensions of their parameters and of the activations that matter (``embed``, ``mlp``,
``batch``, ...). :data:`RULES` says which mesh axes may split a name; :func:`spec` turns names and a shape
into a PartitionSpec that always fits: no mesh axis twice, no axis that does not divide its dimension.

    data       copies of the model, each with its share of the batch; the axis that spans slices
    fsdp       splits batch and parameters; parameters are gathered where they are used
    tensor     splits the wide dimension of each matrix
    sequence   splits the tokens of a row, for rows too long for one device: keys and values are gathered
               where they are read. It splits parameters like fsdp, and the batch not at all

Axis types are Auto: the compiler spreads the shardings of arguments and of :func:`constrain`.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from umm_jax.config import MeshConfig, suggest
from umm_jax.errors import ConfigError, DeviceError

AXES = ("data", "fsdp", "tensor", "sequence")

# Logical name -> the mesh axes that may split it, in order of preference.
RULES: dict[str, tuple[str, ...]] = {
    # fsdp first. With data first, XLA's partitioner silently gets gradients wrong (by up to 100 %) where a
    # matrix or kernel is split over fsdp along its input: it gathers the rows of the batch in one order and
    # uses them in the other (JAX 0.10.2 and 0.12.0; tests/test_sharding.py has cases).
    "batch": ("fsdp", "data"),
    "pictures": ("fsdp", "data", "sequence"),
    "embed": ("fsdp", "sequence"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    # The loss of a row has all its tokens on each device, and a part of the vocabulary.
    "vocab": ("tensor", "sequence"),
    "conv_in": ("fsdp",),
    "conv_out": ("tensor",),
    "sequence": ("sequence",),
    # Dimensions that are looped over or too short to split.
    "layers": (),
    "tokens": (),
    "images": (),
}

# A parameter above this size is never left whole on every device of the fsdp axis if it can be split.
LARGE = 1 << 20


# --- the mesh -------------------------------------------------------------------------------------


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (data, fsdp, tensor, sequence) mesh over `devices` (all of the job's unless given).

    A single process may use fewer devices than it has; a job of several processes must use all of them.

    Raises:
        DeviceError: fewer devices than asked for, or a number that the fixed axes do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    have = len(devices)
    sizes = _sizes(config, have, devices[0].platform if devices else "no")
    need = math.prod(sizes)
    text = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes))
    if need < have and jax.process_count() > 1:
        raise DeviceError(f"the mesh uses {need} of the job's {have} devices ({text}); {_works(have)}")
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices[:need]})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:need])
    if sizes[0] % slices:
        near = math.ceil(sizes[0] / slices) * slices
        raise DeviceError(
            f"the data axis spans the {slices} slices, so its size must be a multiple of {slices}; "
            f"mesh.data is {sizes[0]}, {near} would do"
        )
    within, between = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1, 1)
    return Mesh(mesh_utils.create_hybrid_device_mesh(within, between, devices[:need]), AXES, axis_types=types)


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """As :func:`make_mesh` of so many devices of one slice, to tell placements and not to compute.

    Raises:
        DeviceError: as :func:`make_mesh`.
    """
    return AbstractMesh(_sizes(config, devices, "planned"), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _works(have: int) -> str:
    return f"mesh.data=-1 mesh.fsdp=1 mesh.tensor=1 mesh.sequence=1 uses whatever there is ({have} here)"


def _sizes(config: MeshConfig, have: int, kind: str) -> tuple[int, ...]:
    """Sizes of the axes on `have` devices, the free one (-1) as large as they allow."""
    asked = {name: getattr(config, name) for name in AXES}
    fixed = math.prod(size for size in asked.values() if size != -1)
    text = " x ".join(f"{name} {size}" for name, size in asked.items() if size > 1)
    if fixed > have:
        raise DeviceError(
            f"the mesh asks for {fixed} devices ({text}) and there are {have} ({kind}); {_works(have)}"
        )
    free = [name for name, size in asked.items() if size == -1]
    if free:
        if have % fixed:
            raise DeviceError(
                f"{have} devices do not divide into {text} = {fixed}, so mesh.{free[0]}=-1 has no "
                f"answer; {_works(have)}, or set mesh.{free[0]}={have // fixed} to use "
                f"{have // fixed * fixed} of them"
            )
        asked[free[0]] = have // fixed
    return tuple(asked.values())


_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("umm_jax_mesh", default=None)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """The mesh :func:`constrain` refers to inside this block.

    Enter it *inside* a function given to ``jax.jit``: a traced program is reused whatever the mesh around
    the later calls.
    """
    token = _MESH.set(mesh)
    try:
        yield mesh
    finally:
        _MESH.reset(token)


# --- from logical names to mesh axes ----------------------------------------------------------------


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array of `shape` whose dimensions are called `axes`.

    A mesh axis is given to the first dimension that may have it; axes that do not divide the dimension
    (or have size 1) are skipped, so that the result always fits.

    Raises:
        ValueError: a name without a rule, or another number of names than dimensions.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for an array of shape {tuple(shape)}")
    used: set[str] = set()
    entries = []
    for name, size in zip(axes, shape):
        if name is not None and name not in RULES:
            raise ValueError(
                f"logical axis {name!r} has no rule in sharding.RULES{suggest(name, list(RULES))}"
            )
        taken: list[str] = []
        for axis in RULES[name] if name is not None else ():
            ways = math.prod(mesh.shape[a] for a in (*taken, axis))
            if mesh.shape[axis] > 1 and axis not in used and size % ways == 0:
                taken.append(axis)
        used.update(taken)
        entries.append(None if not taken else taken[0] if len(taken) == 1 else tuple(taken))
    return PartitionSpec(*entries)


def param_spec(axes: Sequence[str | None], shape: Sequence[int], itemsize: int, mesh: Mesh) -> PartitionSpec:
    """As :func:`spec`; a parameter above :data:`LARGE` bytes whose names leave the fsdp axis unused is split
    over it along its largest dimension that divides (never along ``layers``, which a scan walks)."""
    found = spec(axes, shape, mesh)
    ways = mesh.shape["fsdp"]
    used = {axis for entry in found if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
    if ways == 1 or "fsdp" in used or math.prod(shape) * itemsize <= LARGE:
        return found
    free = [
        i
        for i, entry in enumerate(found)
        if entry is None and axes[i] != "layers" and shape[i] % ways == 0 and shape[i] > 0
    ]
    if not free:
        return found
    entries = list(found)
    entries[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*entries)


def logical_axes(state: nnx.State) -> dict[str, tuple[str | None, ...]]:
    """{'/'-joined path: axis names} of every parameter of a (real or abstract) model state.

    Raises:
        ValueError: a parameter that was not created by ``models.layers.param`` and has no names.
    """
    found = {}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata().get("axes")
        if axes is None:
            raise ValueError(
                f"{'/'.join(map(str, path))}: no logical axes; create it with models.layers.param"
            )
        found["/".join(map(str, path))] = tuple(axes)
    return found


def fixed(state: nnx.State) -> frozenset[str]:
    """The '/'-joined paths of what was created by ``models.layers.fixed``: saved, and never learned."""
    return frozenset(
        "/".join(map(str, path))
        for path, variable in nnx.to_flat_state(state)
        if variable.get_metadata().get("fixed")
    )


def shardings(abstract: nnx.State, mesh: Mesh) -> dict[str, Any]:
    """Nested dict of NamedSharding, one for each parameter of `abstract`, from its ``axes`` metadata."""
    axes = logical_axes(abstract)

    def place(path, leaf):
        name = "/".join(str(key.key) for key in path)
        return NamedSharding(mesh, param_spec(axes[name], leaf.shape, leaf.dtype.itemsize, mesh))

    return jax.tree_util.tree_map_with_path(place, nnx.to_pure_dict(abstract))


# --- activations and batches --------------------------------------------------------------------------


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for `x` to lie as its dimension names say, on the mesh of :func:`use`; does nothing outside it."""
    mesh = _MESH.get()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh)))


def by_rows(x: jax.Array) -> jax.Array:
    """:func:`constrain` of an array whose first dimension is of rows."""
    return constrain(x, "batch", *(None,) * (x.ndim - 1))


def by_images(x: jax.Array) -> jax.Array:
    """:func:`constrain` of an array whose first dimension is of the images of all rows, row after row."""
    return constrain(x, "pictures", *(None,) * (x.ndim - 1))


def split_rows(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Asks that the first dimension of each is split as rows are; of their other dimensions nothing is said.

    For what stands between products with split weights, where the compiler may give up the split of rows, or
    of pictures in the order of rows. With a sequence axis nothing is asked: it splits pictures and not rows.
    """
    mesh = _MESH.get()
    if mesh is None or ways("sequence") > 1:
        return arrays

    def asked(x):
        first = spec(("batch",), x.shape[:1], mesh)[0]
        if first is None:
            return x
        open_ = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(first, *open_)))

    return tuple(map(asked, arrays))


def rows_here(rows: int) -> int:
    """Of a dimension of `rows` named "batch", how many a device holds on the mesh of :func:`use`."""
    mesh = _MESH.get()
    if mesh is None:
        return rows
    return NamedSharding(mesh, spec(("batch",), (rows,), mesh)).shard_shape((rows,))[0]


def ways(name: str) -> int:
    """Into how many parts the mesh of :func:`use` can split a dimension of this name."""
    mesh = _MESH.get()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES[name])


def on_each_device(
    function: Callable, arrays: Any, axes: Any, out: Any, out_axes: Any, summed: Sequence[str] = ()
) -> Any:
    """function(*arrays), run by each device on its own part: for what the compiler cannot split itself.

    Args:
        function: needs nothing of the parts of other devices; what it returns is as large as its part.
        arrays, axes: its arguments, and the names of their dimensions in the same structure, a tuple each.
        out, out_axes: shapes of the whole results (anything with a `shape`), and their names.
        summed: names of dimensions of arguments. A result that has no dimension of such a name is what a
            device makes of its part of it, and the sum over the parts is given.

    Outside :func:`use`, or on one device, this is a plain call.
    """
    mesh = _MESH.get()
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    specs = lambda names, whole: jax.tree.map(  # noqa: E731
        lambda x, n: spec(n, x.shape, mesh), whole, names
    )
    taken = specs(axes, arrays)
    over = {name: _axes_of(name, arrays, axes, taken) for name in summed}

    def own(*parts):
        token = _MESH.set(None)  # Inside, there is nothing to be constrained or split.
        try:
            results = function(*parts)
        finally:
            _MESH.reset(token)

        def whole(x, names):
            missing = tuple(axis for name in summed if name not in names for axis in over[name])
            return jax.lax.psum(x, missing) if missing else x

        return jax.tree.map(whole, results, out_axes)

    return jax.shard_map(own, mesh=mesh, in_specs=taken, out_specs=specs(out_axes, out), check_vma=False)(
        *arrays
    )


def _axes_of(name: str, arrays: Any, axes: Any, specs: Any) -> tuple[str, ...]:
    """The mesh axes that split a dimension called `name` of any of the `arrays`."""
    found: dict[str, None] = {}

    def look(_, names, entries):
        for own, entry in zip(names, entries):
            if own == name and entry is not None:
                found.update(dict.fromkeys((entry,) if isinstance(entry, str) else entry))

    jax.tree.map(look, arrays, axes, specs)
    return tuple(found)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over every device that holds its own share of the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


@functools.lru_cache
def share_of_batch(mesh: Mesh) -> tuple[int, int]:
    """Which share of the rows of a batch this process reads, and of how many: (index, count).

    Processes whose devices hold the same rows, where tensor or sequence is larger than a process, read the
    same share.

    Raises:
        DeviceError: processes hold a part of each other's rows.
    """
    held: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((batch_ways(mesh),)).items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    groups = sorted({tuple(sorted(parts)) for parts in held.values()})
    parts = [part for group in groups for part in group]
    if len(set(map(len, groups))) > 1 or len(set(parts)) < len(parts):
        raise DeviceError(
            f"a batch cannot be shared out among {len(held)} processes whose devices hold the parts "
            f"{', '.join(str(list(group)) for group in groups)} of it; choose mesh.tensor x mesh.sequence so "
            "that it divides the devices of a process, or is a multiple of them"
        )
    return groups.index(tuple(sorted(held[jax.process_index()]))), len(groups)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's share of a batch (nested dict of numpy [b, ...]) as global arrays on the mesh.

    Raises:
        ConfigError: the rows do not divide over the mesh.
    """
    ways, sharding, (_, shares) = batch_ways(mesh), batch_sharding(mesh), share_of_batch(mesh)

    def put(rows):
        total = rows.shape[0] * shares
        if total % ways:
            raise ConfigError(f"a batch of {total} rows does not divide over data x fsdp = {ways} devices")
        return jax.make_array_from_process_local_data(sharding, rows, (total, *rows.shape[1:]))

    return jax.tree.map(put, batch)


# --- the report ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placement:
    """One array of a state: where it lies and what it costs each device."""

    path: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes: int
    bytes_per_device: int

    @property
    def replicated(self) -> bool:
        return all(entry is None for entry in self.spec)


@dataclass(frozen=True)
class Report:
    """Every placement of a state, largest first. ``print`` it."""

    placements: tuple[Placement, ...]
    devices: int

    @property
    def bytes_per_device(self) -> int:
        return sum(p.bytes_per_device for p in self.placements)

    @property
    def large_replicated(self) -> tuple[Placement, ...]:
        """Arrays above :data:`LARGE` bytes that every device holds whole."""
        return tuple(p for p in self.placements if p.replicated and p.bytes > LARGE)

    def summary(self) -> str:
        """One line: total, share of each device, what stayed whole."""
        total = sum(p.bytes for p in self.placements)
        whole = sum(p.bytes for p in self.placements if p.replicated)
        return (
            f"{total / 1e6:.1f} MB in {len(self.placements)} arrays, "
            f"{self.bytes_per_device / 1e6:.1f} MB on each of {self.devices} devices, "
            f"{whole / 1e6:.1f} MB replicated"
        )

    def __str__(self) -> str:
        rows = [f"{p.bytes_per_device:>14,} B  {p.path}  {list(p.shape)}  {p.spec}" for p in self.placements]
        return "\n".join([*rows, self.summary()])


def report(abstract: Any, placed: Any, mesh: Mesh) -> Report:
    """The placements of `abstract` (arrays or ShapeDtypeStructs) under `placed` (shardings, same tree)."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    found = []
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(placed), strict=True):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        local = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
        found.append(Placement(name, tuple(leaf.shape), sharding.spec, size, local))
    found.sort(key=lambda p: (-p.bytes, p.path))
    return Report(tuple(found), mesh.size)
