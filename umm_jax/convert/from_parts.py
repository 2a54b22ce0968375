"""``umm convert from-parts``: stock folders become the beginning of a model of ours.

A Llama, Vicuna or Qwen2, a CLIP or SigLIP2, Stable Diffusion's UNet, its or FLUX's autoencoder: what the
family is made of, each optional, as their libraries save them. The result is a run folder that holds the
arrays these give, and no others: ``train.init_from`` takes them, and what is missing comes from the seed.
What a stock model lacks of an array (rows of added tokens, the bias of the head) is made here, each by a rule
that says why.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from umm_jax import config as configs
from umm_jax import families
from umm_jax.convert import layout as layouts
from umm_jax.convert.folder import new_folder, require_new, require_room
from umm_jax.convert.from_torch import read_tokenizer
from umm_jax.convert.source import Source, import_torch, open_source
from umm_jax.errors import CheckpointError, ConfigError
from umm_jax.train.checkpoint import plain_config
from umm_jax.train.parts import PartWriter
from umm_jax.weights.hub import StockPart
from umm_jax.weights.table import TURNS, Table, parse_index, require_fit

NULL = "null_condition"


def from_parts(
    run: configs.RunConfig,
    out: str | Path,
    parts: Mapping[str, str | Path],
    *,
    text_encoder: str | Path | None = None,
    text_tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
    checksums: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Makes the run folder `out` of the stock folders `parts`, {name: path}; names are the family's PARTS.

    Args:
        run: the config of the model that is begun.
        text_encoder, text_tokenizer: folders of a CLIP text model and its tokenizer, whose output for the
            empty prompt becomes the condition that guidance starts from (spec mm_interleaved, section 5).
        allow_pickle, checksums: see ``source.open_source``.

    Raises:
        CheckpointError: a missing, extra or misshapen tensor, a damaged file.
        ConfigError: a part whose config.json disagrees with the model, or that the model does not have.
        StorageError: no room. Nothing is left behind then, nor in any other case.
    """
    out = Path(out)
    require_new(out)
    if not parts and text_encoder is None:
        raise ConfigError("no part was given: --llama, --clip, --siglip, --unet, --vae or --text-encoder")
    family = families.get(run.family)
    model = configs.from_dict(family.config.ModelConfig, run.model, "config.model")
    ours = layouts.shapes_of(run.family, model)
    read: dict[str, _Part] = {}
    for name, path in parts.items():
        source = open_source(path, allow_pickle=allow_pickle, checksums=checksums)
        read[name] = _Part(family.weights.stock_part(name, model, source.shapes), source, ours, say)
    arrays = {path: array for part in read.values() for path, array in part.arrays.items()}
    empty = None
    if text_encoder is not None:
        empty = empty_prompt(text_encoder, text_tokenizer, allow_pickle)
        if ours.get(NULL) != empty.shape:
            raise ConfigError(
                f"{text_encoder}: the empty prompt gives {list(empty.shape)}, {NULL} is "
                f"{list(ours.get(NULL, ()))}"
            )
        arrays[NULL] = (empty.shape, empty.dtype)
    pieces = read_tokenizer(Path(parts["llm"]), None, model) if "llm" in parts else None
    require_room(out, sum(layouts.nbytes(*a) for a in arrays.values()) + (64 << 20), "the run")

    run = dataclasses.replace(
        run,
        model=configs.to_dict(model),
        eval=replace(run.eval, weights="raw"),
        train=replace(run.train, init_from="", objective="model"),
    )
    with new_folder(out) as folder:
        configs.save(run, folder / "config.json")
        if pieces is not None:
            pieces.save(folder / "tokenizer.model")
        rules = [rule for part in read.values() for rule in part.table.rules]
        stacked = layouts.stacked(rules)
        stacked |= {to for part in read.values() for path in stacked for to in part.copies.get(path, ())}
        writer = PartWriter(folder / "checkpoints", arrays, stacked, plain_config(run, model))
        for part in read.values():
            part.write(writer)
        if empty is not None:
            writer.write(NULL, (), empty)
    for name, part in read.items():
        say(f"{name:5} {len(part.arrays)} arrays from {parts[name]}")
        for row in part.table.fresh:
            say(f"      {row.ours} made here: {row.why}")
    if empty is not None:
        say(f"text  {NULL} from the empty prompt of {text_encoder}")
    if pieces is None:
        say(f"{out}: has no tokenizer.model; training needs data.tokenizer")
    rest: dict[str, int] = {}
    for path in ours:
        if path not in arrays:
            group = "/".join(path.split("/")[:2])
            rest[group] = rest.get(group, 0) + 1
    listed = ", ".join(f"{group} ({count})" for group, count in sorted(rest.items()))
    say(f"{out}: {len(arrays)} of {len(ours)} arrays, for train.init_from={out}; the seed gives {listed}")


class _Part:
    """A stock folder with the table that reads it, checked."""

    def __init__(self, stock: StockPart, source: Source, ours: Mapping[str, Any], say: Callable):
        self.source, self.names, self.stock = source, {}, stock
        table = stock.reading
        for name in source.entries:
            canonical = table.canonical(name)
            if canonical in self.names:
                raise CheckpointError(f"{source.where}: {self.names[canonical]} and {name} are one tensor")
            self.names[canonical] = name
        shapes = {name: source.entries[theirs].shape for name, theirs in self.names.items()}
        for name, prepare in stock.prepare.items():
            if name in shapes:
                shapes[name] = prepare(np.zeros(shapes[name], np.float32)).shape
        self.table = self._with_convolutions(table, shapes)
        subset = stock.subset(ours)
        self.table.check(subset)
        require_fit(self.table, subset, shapes, str(source.where))
        self._compare_config(stock, say)
        dtypes: dict[str, dict[str, np.dtype]] = {}
        for rule in self.table.rules:
            dtypes.setdefault(rule.path, {})[rule.theirs] = source.entries[self.names[rule.theirs]].dtype
        self.arrays = {
            path: (shape, layouts.common_dtype(dtypes.get(path, {path: np.dtype(np.float32)})))
            for path, shape in subset.items()
        }
        self.copies: dict[str, list[str]] = {}
        for path, origin in stock.copies.items():
            self.copies.setdefault(origin, []).append(path)
            self.arrays[path] = self.arrays[origin]

    @staticmethod
    def _with_convolutions(table: Table, shapes: Mapping[str, Any]) -> Table:
        # Old autoencoders hold their attention's projections as 1x1 convolutions.
        rules = tuple(
            replace(rule, how="linear_1x1")
            if rule.how == "linear" and shapes.get(rule.theirs, ())[2:] == (1, 1)
            else rule
            for rule in table.rules
        )
        return replace(table, rules=rules)

    def _compare_config(self, stock: StockPart, say: Callable[[str], None]) -> None:
        """Raises ConfigError where the folder's config.json says what no shape would tell, and it differs."""
        where = self.source.where
        path = (where if where.is_dir() else where.parent) / "config.json"
        found = layouts.read_json(path)
        if found is None:
            say(f"{path}: not there, so heads, norms and activations are believed to be the model's")
            return
        found = found.get("vision_config", found)
        found = {"rope_theta": (found.get("rope_parameters") or {}).get("rope_theta")} | found
        heads = found.get("attention_head_dim")
        if isinstance(heads, int):
            found["attention_head_dim"] = [heads] * len(stock.config.get("block_out_channels", ()))
        for key in stock.alike:
            if found.get(key) is not None and found[key] != stock.config[key]:
                raise ConfigError(
                    f"{path}: {key} is {found[key]!r}, the model has {stock.config[key]!r}: the shapes would "
                    "fit and the outputs would be wrong; change the config of the model"
                )

    def write(self, writer: PartWriter) -> None:
        """Every row, into its place; one tensor at a time."""
        for rule in tqdm(self.table.rules, desc="from-parts", unit=" tensors", disable=None):
            dtype = self.arrays[rule.path][1]
            array = self.source.read(self.names[rule.theirs])
            if rule.theirs in self.stock.prepare:
                array = self.stock.prepare[rule.theirs](array)
            array = layouts.cast(TURNS[rule.how].ours(array), dtype, rule.theirs)
            for path in (rule.path, *self.copies.get(rule.path, ())):
                writer.write(path, rule.index, array)
        for row in self.table.fresh:
            path = row.ours.partition("[")[0]
            index, (shape, dtype) = parse_index(row.ours), self.arrays[path]
            of_part = np.broadcast_to(np.zeros((), bool), shape)[index].shape
            made = np.asarray(row.value(of_part)).astype(dtype)
            for to in (path, *self.copies.get(path, ())):
                writer.write(to, index, made)


def empty_prompt(encoder: str | Path, tokenizer: str | Path | None, allow_pickle: bool) -> np.ndarray:
    """Last hidden states of a CLIP text model for the empty prompt, padded to its length: float32 [77, D].

    Raises:
        ConfigError: no tokenizer, no torch or transformers, or folders that these cannot read.
    """
    if tokenizer is None:
        raise ConfigError("--text-encoder needs the tokenizer that goes with it: --tokenizer2=DIR")
    torch = import_torch("--text-encoder")
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError:
        raise ConfigError(
            "--text-encoder needs transformers, which is not installed: pip install transformers"
        ) from None
    try:
        words = CLIPTokenizer.from_pretrained(str(tokenizer), local_files_only=True)
        safe = None if allow_pickle else True
        model = CLIPTextModel.from_pretrained(str(encoder), local_files_only=True, use_safetensors=safe)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{encoder}, {tokenizer}: {str(error).strip().splitlines()[0][:200]}") from None
    length = model.config.max_position_embeddings
    ids = words("", padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).last_hidden_state[0].float().numpy()
