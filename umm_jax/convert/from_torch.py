"""``umm convert from-torch``: a checkpoint with the release's names becomes a run folder of ours.

    RUN/config.json, tokenizer.model, checkpoints/0     as any run: chat with it, train.init_from it
    RUN/torch/manifest.json                             name, dtype, shape and sha256 of every tensor
    RUN/torch/constants.safetensors                     tensors that we compute, as they were
    RUN/torch/tokenizer/                                its tokenizer files, as they were

Everything is checked before anything is written; then one tensor at a time is read, turned and put in place.
Values keep the dtype they have, so that ``to-torch`` gives back the same bits.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from umm_jax import config as configs
from umm_jax import families
from umm_jax.convert import layout as layouts
from umm_jax.convert.folder import new_folder, require_new, require_room
from umm_jax.convert.layout import Layout
from umm_jax.convert.shards import DTYPE_NAMES, Shards, Tensor
from umm_jax.convert.source import Source, joined, open_source
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.errors import CheckpointError, ConfigError
from umm_jax.train.checkpoint import plain_config
from umm_jax.train.parts import PartWriter
from umm_jax.weights.table import TURNS, require_fit

FAMILY = "mm_interleaved"


def from_torch(
    path: str | Path,
    out: str | Path,
    *,
    config: str | Path | None = None,
    family: str | None = None,
    allow_pickle: bool = False,
    checksums: bool = True,
    tokenizer: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Reads the weights at `path` and makes the run folder `out`.

    Args:
        config: a run config whose model they are; else ``config.json`` beside them says, else they are
            taken for the family's release.
        family: whose names the tensors have, where no ``config.json`` says.
        allow_pickle, checksums: see ``source.open_source``.
        tokenizer: its file; else ``tokenizer.model`` beside the weights, or ``tokenizer.json`` where the
            family adds nothing to a vocabulary, if there is one.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor, a constant that is not ours, a damaged file.
        ConfigError: `out` is there already; a model or tokenizer that does not fit.
        StorageError: no room. Nothing is left behind then, nor in any other case.
    """
    path, out = Path(path), Path(out)
    require_new(out)
    folder = path if path.is_dir() else path.parent
    own_way = layouts.folder_family(path)
    if own_way is None:
        source = open_source(path, allow_pickle=allow_pickle, checksums=checksums)
    else:
        files = families.get(own_way).weights.FOLDER.files
        opened = {prefix: open_source(path / file, checksums=checksums) for file, prefix in files.items()}
        source, family = joined(path, opened), family or own_way
    names = {}  # of ours in the table: of theirs in the files
    run, layout, which = _describe(folder, config, family, source)
    for name in source.entries:
        canonical = layout.table.canonical(name)
        if canonical in names:
            raise CheckpointError(f"{path}: {names[canonical]} and {name} are two names of one tensor")
        names[canonical] = name
    say(f"{path}: {len(names)} tensors, {_gigabytes(source):.2f} GB; model of {which}")
    found = {name: source.entries[theirs].shape for name, theirs in names.items()}
    require_fit(layout.table, layout.ours, found, str(path))
    _check_constants(layout, source, names)

    dtypes: dict[str, dict[str, np.dtype]] = {}
    for rule in layout.table.rules:
        dtypes.setdefault(rule.path, {})[rule.theirs] = source.entries[names[rule.theirs]].dtype
    arrays = {p: (layout.ours[p], layouts.common_dtype(found)) for p, found in dtypes.items()}
    pieces = read_tokenizer(folder, tokenizer, layout.model)
    require_room(out, sum(layouts.nbytes(*a) for a in arrays.values()) + (64 << 20), "the run")

    with new_folder(out) as part:
        configs.save(run, part / "config.json")
        if pieces is not None:
            pieces.save(part / "tokenizer.model")
        identity = plain_config(run, layout.model)
        writer = PartWriter(part / "checkpoints", arrays, layouts.stacked(layout.table.rules), identity)
        manifest = {}
        for rule in tqdm(layout.table.rules, desc="from-torch", unit=" tensors", disable=None):
            array = source.read(names[rule.theirs])
            manifest[rule.theirs] = _noted(array)
            array = layouts.cast(TURNS[rule.how].ours(array), arrays[rule.path][1], rule.theirs)
            writer.write(rule.path, rule.index, array)
        manifest |= _keep_constants(layout, source, names, part)
        _keep_tokenizer(folder, part)
        aliases = {name: theirs for name, theirs in names.items() if name != theirs}
        note = {
            "family": layout.family,
            "source": {file.name: file.stat().st_size for file in source.files},
            "renamed": aliases,
            "tensors": manifest,
        }
        (part / layouts.MANIFEST).write_text(json.dumps(note, indent=1) + "\n")
    say(f"{out}: {len(arrays)} arrays of {len(layout.table.rules)} tensors in checkpoints/0")
    if pieces is None:
        say(f"{out}: no tokenizer.model was found; give one with --tokenizer to chat with it or train it")


def _describe(
    folder: Path, config: str | Path | None, family: str | None, source: Source
) -> tuple[configs.RunConfig, Layout, str]:
    """(config of the new run, layout of the tensors, where the sizes come from)."""
    if config is not None:
        run = configs.load(config)
        if family not in (None, run.family):
            raise ConfigError(f"{config} is of the family {run.family}, --family says {family}")
        model = configs.from_dict(families.get(run.family).config.ModelConfig, run.model, "config.model")
        layout, which = Layout(run.family, model), str(config)
        # What was trained elsewhere has no averages here, and starts from no other run.
        run = dataclasses.replace(
            run,
            eval=dataclasses.replace(run.eval, weights="raw"),
            train=dataclasses.replace(run.train, init_from=""),
        )
    else:
        found = layouts.read_json(folder / "config.json")
        own, which = layouts.own_config(found), str(folder / "config.json")
        described = None if family is None else families.get(family).weights.FOLDER
        if own is None and described is not None:
            found = {key: layouts.read_json(folder / file) for key, file in described.configs.items()}
            which = ", ".join(described.configs.values())
        if own is None:
            family = family or _family_of(found, source) or FAMILY
            weights = families.get(family).weights
            model = None if found is None else weights.config_of(found, source.shapes)
            if model is None:
                model, which = weights.release_config(), f"the release of {family} (no config.json of ours)"
            own = family, model
        layout, run = Layout(*own), configs.RunConfig(family=own[0], model={})
    return dataclasses.replace(run, model=configs.to_dict(layout.model)), layout, which


def _family_of(found: dict[str, Any] | None, source: Source) -> str | None:
    """The family of whose reference a ``config.json`` is, if it is of any."""
    if found is None:
        return None
    return next(
        (n for n in families.names() if families.get(n).weights.config_of(found, source.shapes)), None
    )


def _check_constants(layout: Layout, source: Source, names: dict[str, str]) -> None:
    """Raises CheckpointError where a tensor that we compute has other values in the checkpoint."""
    for constant in layout.table.constants:
        if constant.theirs not in names:
            continue
        theirs = source.read(names[constant.theirs])
        off = np.abs(theirs.astype(np.float64) - constant.value())
        if not (off <= layouts.tolerance(theirs, constant.tolerance)).all():
            raise CheckpointError(
                f"{source.where}: {constant.theirs} differs from what our model computes by up to "
                f"{np.nanmax(off):.3g} (allowed {constant.tolerance:.0e}): read by our table it would mean "
                "something else; nothing was written"
            )


def _keep_constants(layout: Layout, source: Source, names: dict[str, str], part: Path) -> dict[str, Any]:
    """Writes them down as they were; returns their lines of the manifest."""
    (part / layouts.KEPT).mkdir()
    tensors, noted, path = {}, {}, part / layouts.CONSTANTS
    for constant in layout.table.constants:
        if constant.theirs in names:
            entry = source.entries[names[constant.theirs]]
            tensors[constant.theirs] = Tensor(entry.shape, entry.dtype)
    with Shards(path.parent, path.stem, tensors, limit=1 << 62) as shards:
        for name in tensors:
            array = np.ascontiguousarray(source.read(names[name]))
            shards.write(name, array)
            noted[name] = _noted(array)
    return noted


def _keep_tokenizer(folder: Path, part: Path) -> None:
    kept = part / layouts.TOKENIZER
    for name in layouts.TOKENIZER_FILES:
        if (folder / name).is_file():
            kept.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, kept / name)


def read_tokenizer(folder: Path, given: str | Path | None, model: Any) -> Tokenizer | None:
    """The run's tokenizer, with the pieces for images that a language model's own lacks."""
    own = ("tokenizer.model",) if hasattr(model.layout, "soi_id") else ("tokenizer.json", "tokenizer.model")
    path = Path(given) if given else next((folder / n for n in own if (folder / n).is_file()), None)
    if path is None:
        return None
    tokenizer = Tokenizer.load(path)
    if path.suffix == ".model" and not hasattr(model.layout, "soi_id"):
        tokenizer = with_added_pieces(tokenizer, path)
    if tokenizer.size > model.vocab:
        raise ConfigError(f"{path}: {tokenizer.size} pieces are more than the model's {model.vocab} ids")
    return with_image_pieces(tokenizer, model, path)


def with_added_pieces(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """`tokenizer`, with the control pieces that ``added_tokens.json`` beside its file says follow.

    Raises:
        ConfigError: they do not follow its last id, one after the other.
    """
    beside, size = path.with_name("added_tokens.json"), tokenizer.size
    found = layouts.read_json(beside) or {}
    added = {n: piece for piece, n in found.items() if n >= size}
    if sorted(added) != list(range(size, size + len(added))):
        raise ConfigError(
            f"{beside}: its ids {', '.join(map(str, sorted(added)))} do not follow the {size} pieces of "
            f"{path.name}, one by one; give the tokenizer the model was trained with"
        )
    return tokenizer.extended([added[n] for n in sorted(added)]) if added else tokenizer


def with_image_pieces(tokenizer: Tokenizer, model: Any, path: Path) -> Tokenizer:
    """`tokenizer`, extended by the layout's soi and image pieces where they follow its last id.

    Raises:
        ConfigError: they have, or would get, other ids than the model expects.
    """
    layout = getattr(model, "layout", None)
    if not hasattr(layout, "soi_id"):
        return tokenizer  # nothing was added to its vocabulary
    if tokenizer.size == layout.soi_id:
        return tokenizer.extended([layout.soi, layout.image])
    try:
        found = tokenizer.id(layout.soi)
    except ConfigError:
        found = None
    if found != layout.soi_id:
        raise ConfigError(
            f"{path}: its {tokenizer.size} pieces do not go with a model whose {layout.soi} has the id "
            f"{layout.soi_id}; give the tokenizer it was trained with"
        )
    return tokenizer


def _noted(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": DTYPE_NAMES[array.dtype],
        "shape": list(array.shape),
        "sha256": sha256_of_array(array),
    }


def sha256_of_array(array: np.ndarray) -> str:
    """The SHA-256 of a tensor's bytes in C order, as safetensors stores them."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest()


def _gigabytes(source: Source) -> float:
    return sum(layouts.nbytes(entry.shape, entry.dtype) for entry in source.entries.values()) / 1e9
