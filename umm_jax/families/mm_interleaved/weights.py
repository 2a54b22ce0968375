"""The released checkpoint of MM-Interleaved, tensor by tensor, and the stock parts it was begun from.

:func:`table` gives the rows for any config of the release's layout: only sizes differ. What our model
computes and the release stores (position tables, the images' mean and deviation, an index) are constants.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from umm_jax.errors import ConfigError
from umm_jax.families.mm_interleaved.config import ModelConfig
from umm_jax.families.mm_interleaved.reference import is_reference, reference_config
from umm_jax.families.mm_interleaved.reference import release_config as release_config
from umm_jax.models.positions import sincos_1d
from umm_jax.models.vision import CLIP_MEAN, CLIP_STD
from umm_jax.weights import hub, stock
from umm_jax.weights.table import Constant, Rule, Table, require

ARCHITECTURE = "MMInterleaved"  # what an export's config.json calls it
FOLDER = None
VISION = "visual_tokenizer.encoder.vision_model."
DECODER = "image_decoder.decoder."


def table(config: ModelConfig) -> Table:
    """Rows between the release's state dict and our parameters.

    Raises:
        ConfigError: a model that is not laid out like the release (another tower, no resampler, pixels as
            latents, ...): there is no released name for its parts.
    """
    _require_release_layout(config)
    return Table(
        rules=tuple(_rules(config)), constants=tuple(_constants(config)), aliases=stock.AUTOENCODER_ALIASES
    )


def config_of(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The config of a checkpoint whose ``config.json`` holds `found` and whose tensors have `shapes`.

    None where the file is not of the reference's kind. Raises CheckpointError where it lacks what is needed.
    """
    return reference_config(found, shapes) if is_reference(found) else None


PARTS = ("llm", "clip", "unet", "vae")  # what stock classes load, and what a pre-training begins from


def stock_part(
    name: str, config: ModelConfig, found: Mapping[str, tuple[int, ...]] | None = None
) -> hub.StockPart:
    """One of PARTS of a model.

    Args:
        found: {name: shape} of a stock folder that is read: it says how many pieces a language model has.

    Raises:
        ConfigError: that part of this model is not laid out like the stock one.
    """
    c = config
    if name == "llm":
        if found is None:
            return hub.llama(c.backbone)
        table = found.get("model.embed_tokens.weight", found.get("embed_tokens.weight"))
        rows = c.vocab if table is None else table[0]  # without one the comparison will name it
        return hub.llama(c.backbone, rows=rows, added=c.added_tokens, head="lm_head.weight" in found)
    if name == "clip":
        if c.tower.kind != "clip_adapter":
            raise ConfigError(f"config.model.tower.kind is {c.tower.kind!r}: it has no CLIP in it")
        return hub.clip(c.tower.clip_adapter.clip, "tower/clip/")
    if name == "unet":
        return hub.unet(c.unet, "unet/")
    if name == "vae":
        return hub.autoencoder(c.autoencoder, "autoencoder/", c.layout.target_size)
    raise ConfigError(f"{name!r} is no part: {', '.join(PARTS)}")


def _require_release_layout(c: ModelConfig) -> None:
    unet, backbone = c.unet, c.backbone
    odd = {
        "tower.kind": (c.tower.kind, "clip_adapter"),
        "visual_resampler.kind": (c.visual_resampler.kind, "qformer"),
        "context_resampler.kind": (c.context_resampler.kind, "qformer"),
        "context.positions": (c.context.positions, "sincos"),
        "context.project": (c.context.project, True),
        "autoencoder.kind": (c.autoencoder.kind, "kl"),
        "unet.skips": (unet.skips, "all"),
        "unet.patch": (unet.patch, 1),
        "unet.norm": (unet.norm, "group"),
        "unet.grid_vectors": (unet.grid_vectors, False),
        "unet.qk_norm": (unet.qk_norm, False),
        "unet.upsample": (unet.upsample, "nearest"),
        "unet.time_conditioning": (unet.time_conditioning, "add"),
        "backbone.qk_norm": (backbone.qk_norm, False),
        "backbone.gated_mlp": (backbone.gated_mlp, True),
        "unet_sync.out_init": (c.unet_sync.out_init if c.unet_sync else 0.0, 0.0),
    }
    require("the release", odd)
    if not c.added_tokens or c.unet_sync is None or backbone.synchronizer is None:
        raise ConfigError(
            "config.model: the release's layout has both synchronizers (backbone.synchronizer, unet_sync) "
            "and a head of added_tokens >= 1"
        )


def _rules(c: ModelConfig) -> Iterator[Rule]:
    yield Rule("mm_decoder.embed_tokens.weight", "embed/table")
    yield Rule("soi_token", "soi_token", "first")
    yield from stock.llama("mm_decoder.", "backbone/", c.backbone)
    for i in range(c.backbone.syncs):
        yield from _backbone_sync(
            f"mm_decoder.layers.{i * c.backbone.sync_every}.llama_cross_attn.", f"[{i}]"
        )
    yield from stock.weight("text_decoder.head", "head/base")
    yield from stock.weight("text_decoder.head_new", "head/added")

    adapter = c.tower.clip_adapter
    yield from stock.clip_vision(VISION, "tower/clip/", adapter.clip)
    yield from _adapter(f"{VISION}adapter_", "tower/", adapter.blocks, adapter.extra)
    for name, own in {"pos_proj": "token_proj", "proj": None}.items():
        yield from stock.weight(f"visual_tokenizer.{name}", f"tower/{own}" if own else "visual_proj")
    yield from stock.norm("visual_tokenizer.pos_ln", "tower/token_norm")
    yield from stock.norm("visual_tokenizer.post_ln", "tower/out_norm")
    yield from _resampler("visual_tokenizer.", "visual_resampler/", c.visual_resampler)

    yield from stock.weight("context_feat_proj", "context/proj")
    yield from _resampler("image_decoder.", "context_resampler/", c.context_resampler)
    yield Rule("image_decoder.neg_prompt_embeds", "null_condition", "first")
    yield from stock.unet(f"{DECODER}unet.", "unet/", c.unet)
    for theirs, ours in _decoder_syncs(c):
        yield from _synchronizer(f"{theirs}mmfs.", f"{ours}core/")
        yield from stock.norm(f"{theirs}query_norm", f"{ours}query_norm")
        yield from stock.norm(f"{theirs}feat_norm", f"{ours}map_norm")
        yield from stock.weight(f"{theirs}conv", f"{ours}conv", "linear_1x1")
    yield from stock.autoencoder(f"{DECODER}vae.", "autoencoder/", c.autoencoder)


def _resampler(theirs: str, ours: str, config) -> Iterator[Rule]:
    yield Rule(f"{theirs}perceiver_resampler.queries", f"{ours}queries", "first")
    yield from stock.qformer(f"{theirs}perceiver_resampler.blip2qformer.", ours, config)


def _synchronizer(theirs: str, ours: str, index: str = "") -> Iterator[Rule]:
    parts = {
        "dynamic_offset_mask": "query",
        "sampling_offsets": "offsets",
        "attention_weights": "logits",
        "value_proj": "values",
        "output_proj": "out",
    }
    for name, own in parts.items():
        yield from stock.weight(f"{theirs}{name}", f"{ours}{own}", index=index)
    yield Rule(f"{theirs}query_relpos.weight", f"{ours}relative{index}")
    yield Rule(f"{theirs}ignore_token", f"{ours}ignore{index}", "vector")


def _backbone_sync(theirs: str, index: str) -> Iterator[Rule]:
    ours = "backbone/syncs/"
    yield Rule(f"{theirs}gate", f"{ours}gate{index}")
    yield from stock.norm(f"{theirs}norm1", f"{ours}query_norm", index=index, bias=False)
    yield from stock.norm(f"{theirs}norm2", f"{ours}map_norm", index=index, bias=False)
    yield from _synchronizer(f"{theirs}attn.", f"{ours}core/", index)


def _decoder_syncs(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """(prefix of theirs, prefix of ours) of every place where the UNet looks back."""
    module = f"{DECODER}mmfs_module."
    for i in range(len(c.unet.skip_shapes())):
        yield f"{module}mmfs_down_blocks.{i}.", f"unet_sync/down/{i}/"
    yield f"{module}mmfs_mid_block.", "unet_sync/mid/"


def _adapter(theirs: str, ours: str, blocks: int, extra: int) -> Iterator[Rule]:
    def attention(name: str, own: str, index: str) -> Iterator[Rule]:
        parts = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "values"}
        for part, to in (parts | {"output_proj": "out"}).items():
            yield from stock.weight(f"{name}.attn.{part}", f"{own}/attention/{to}", index=index)
        yield from stock.norm(f"{name}.query_norm", f"{own}/query_norm", index=index)
        yield from stock.norm(f"{name}.feat_norm", f"{own}/source_norm", index=index)

    def extractor(name: str, own: str, index: str = "") -> Iterator[Rule]:
        yield from attention(name, own, index)
        yield from stock.norm(f"{name}.ffn_norm", f"{own}/mlp_norm", index=index)
        yield from stock.weight(f"{name}.ffn.fc1", f"{own}/up", index=index)
        yield from stock.weight(f"{name}.ffn.dwconv.dwconv", f"{own}/conv", "conv", index=index)
        yield from stock.weight(f"{name}.ffn.fc2", f"{own}/down", index=index)

    stem = [(f"stem.{i}", f"stem.{i + 1}") for i in (0, 3, 6)]
    stem += [(f"conv{i}.0", f"conv{i}.1") for i in (2, 3, 4)]
    for i, (conv, norm) in enumerate(stem):
        yield from stock.weight(f"{theirs}spm.{conv}", f"{ours}stem/convs/{i}", "conv", bias=False)
        yield from stock.norm(f"{theirs}spm.{norm}", f"{ours}stem/norms/{i}")
    for i in range(4):
        yield from stock.weight(f"{theirs}spm.fc{i + 1}", f"{ours}stem/to_maps/{i}", "linear_1x1")
    yield Rule(f"{theirs}level_embed", f"{ours}level")
    for i in range(blocks):
        block, to, at = f"{theirs}interactions.{i}", f"{ours}interactions", f"[{i}]"
        yield from attention(f"{block}.injector", f"{to}/injector", at)
        yield Rule(f"{block}.injector.gamma", f"{to}/injector/gamma{at}")
        yield from extractor(f"{block}.extractor", f"{to}/extractor", at)
    for i in range(extra):
        yield from extractor(f"{theirs}interactions.{blocks - 1}.extra_extractors.{i}", f"{ours}extra/{i}")
    yield Rule(f"{theirs}up.weight", f"{ours}up/kernel", "unfold_2x2")
    yield Rule(f"{theirs}up.bias", f"{ours}up_bias")


# --- what is computed -------------------------------------------------------------------------------


def _constants(c: ModelConfig) -> Iterator[Constant]:
    adapter = c.tower.clip_adapter
    tokens, grid = adapter.tokens, adapter.position_grid
    yield Constant("visual_tokenizer.clip_mean", lambda: CLIP_MEAN.reshape(1, 3, 1, 1))
    yield Constant("visual_tokenizer.clip_std", lambda: CLIP_STD.reshape(1, 3, 1, 1))
    yield Constant("visual_tokenizer.pos_embed", partial(_grid_table, grid, adapter.width, class_token=True))
    yield Constant(f"{VISION}embeddings.position_ids", lambda: np.arange(tokens)[None])
    shapes = [*c.unet.skip_shapes(), c.unet.mid_shape()]
    for (theirs, _), (_, width) in zip(_decoder_syncs(c), shapes, strict=True):
        yield Constant(f"{theirs}pos_embed", partial(_grid_table, c.unet_sync.position_grid, width))


def _grid_table(grid: int, width: int, class_token: bool = False) -> np.ndarray:
    """The fixed position table as the release stores it: [grid * grid, width], class token (zeros) first."""
    axis = sincos_1d(grid, width // 2)
    rows = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    columns = np.broadcast_to(axis[None], (grid, grid, width // 2))
    flat = np.concatenate([rows, columns], axis=-1).reshape(grid * grid, width)
    return np.concatenate([np.zeros((1, width), np.float32), flat]) if class_token else flat
