"""Checkpoints of the systems this family is of the kind of: LLaVA and GroundingGPT, with LISA's mask head.

UnifiedMLLM's authors released nothing, so there is nothing of theirs to convert. The names are those of the
public code of its ancestors: LLaVA's for the language model, projector and tower, LISA's for the mask head,
LoRAMoE's for the experts. GroundingGPT calls the projector ``mm_vision_projector``.

A LISA checkpoint's mask decoder looks at the map of SAM's own image encoder (``masks.encoder``). A mask head
that looks at the tower's map has a neck alone, under the names of that encoder's.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from umm_jax.errors import CheckpointError, ConfigError
from umm_jax.families.unified_mllm.config import MaskConfig, ModelConfig
from umm_jax.families.unified_mllm.stream import LayoutConfig
from umm_jax.models.backbone import BackboneConfig
from umm_jax.models.sam_encoder import SamEncoderConfig
from umm_jax.models.tower import TowerConfig
from umm_jax.models.vision import ClipConfig, ClipTowerConfig
from umm_jax.weights import hub, stock
from umm_jax.weights.table import Rule, Table, Unused, require

ARCHITECTURE = "LlavaLlamaForCausalLM"
FOLDER = None
PARTS = ("llm", "clip")
TOWER = "model.vision_tower.vision_tower.vision_model."
SAM = "model.visual_model."
PROJECTOR = "model.mm_projector."
_CLIP = ClipConfig(image_size=336)


def table(config: ModelConfig) -> Table:
    """Rows between the ancestors' state dict and our parameters.

    Raises:
        ConfigError: a model that is not laid out like them: there is no released name for its parts.
    """
    _require_release_layout(config)
    why = "video and audio are not read by this family"
    return Table(
        rules=tuple(_rules(config)),
        unused=(
            Unused(
                rf"{TOWER}encoder\.layers\.{config.tower.clip.clip.layers - 1}\..*", "a layer nobody reads"
            ),
            Unused(rf"{TOWER}post_layernorm\.(weight|bias)", "our tower stops before this norm"),
            Unused(rf"{TOWER}embeddings\.position_ids", "0, 1, 2, ..."),
            Unused(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed"),
            Unused(r"model\.(visual_encoder|ln_vision|Qformer|query_tokens|llama_proj)\b.*", why),
            Unused(r"model\.(video|audio)_\w+.*", why),
        ),
        aliases=((r"^model\.mm_vision_projector\.", PROJECTOR),),
    )


def release_config() -> ModelConfig:
    """LLaVA-1.5 7B's sizes, without a mask head."""
    return ModelConfig(
        backbone=BackboneConfig(vocab=32000, width=4096, layers=32, heads=32, mlp=11008, norm_eps=1e-5),
        masks=None,
    )


def config_of(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
    """The config of a checkpoint whose ``config.json`` holds `found` and whose tensors have `shapes`.

    None where it is not LLaVA's, GroundingGPT's or LISA's. Raises CheckpointError where it lacks a value.
    """
    if found.get("model_type") not in ("llava", "llava_llama", "LEGO"):
        return None
    try:
        backbone = BackboneConfig(
            vocab=shapes["model.embed_tokens.weight"][0],
            width=found["hidden_size"],
            layers=found["num_hidden_layers"],
            heads=found["num_attention_heads"],
            kv_heads=found.get("num_key_value_heads"),
            mlp=found["intermediate_size"],
            norm_eps=found["rms_norm_eps"],
            rope_base=float(found.get("rope_theta", 10000.0)),
        )
    except KeyError as error:
        raise CheckpointError(
            f"config.json or state dict have no {error.args[0]!r}, which tells sizes"
        ) from None
    clip = _clip_of(found, shapes)
    hidden = (backbone.width,) if any(name.endswith("_projector.2.weight") for name in shapes) else ()
    masks = _masks_of(shapes)
    large = masks.encoder.image_size if masks and masks.encoder else 0
    layout = LayoutConfig(
        image_size=clip.image_size,
        image_tokens=clip.grid**2,
        large_size=large,
        dialect="lisa" if masks else "umm1",
    )
    return ModelConfig(
        layout=layout,
        backbone=backbone,
        tower=TowerConfig(kind="clip", clip=ClipTowerConfig(clip, found.get("mm_vision_select_layer", -2))),
        adapter=hidden,
        masks=masks,
    )


def _masks_of(shapes: Mapping[str, tuple[int, ...]]) -> MaskConfig | None:
    """A LISA's mask head, its encoder by its tensors; None where there is none."""
    if f"{SAM}mask_decoder.iou_token.weight" not in shapes:
        return None
    places = shapes.get(f"{SAM}image_encoder.pos_embed")
    if places is None:
        return MaskConfig()
    _, grid, _, width = places
    blocks = f"{SAM}image_encoder.blocks."
    layers = 1 + max(int(n.removeprefix(blocks).split(".")[0]) for n in shapes if n.startswith(blocks))
    reach = [shapes[f"{blocks}{i}.attn.rel_pos_h"] for i in range(layers)]
    patch = shapes[f"{SAM}image_encoder.patch_embed.proj.weight"][-1]
    encoder = SamEncoderConfig(
        image_size=grid * patch,
        patch=patch,
        width=width,
        layers=layers,
        heads=width // reach[0][1],
        mlp=shapes[f"{blocks}0.mlp.lin1.weight"][0],
        groups=sum(r[0] == 2 * grid - 1 for r in reach),
        window=(reach[0][0] + 1) // 2,
    )
    return MaskConfig(encoder=encoder)


def _clip_of(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ClipConfig:
    """By the tower's tensors where the checkpoint has them, else by its name."""
    places = shapes.get(f"{TOWER}embeddings.position_embedding.weight")
    if places is None:
        name = str(found.get("mm_vision_tower", ""))
        side = 336 if "336" in name else 224
        return ClipConfig(image_size=side)
    grid, patch = math.isqrt(places[0] - 1), shapes[f"{TOWER}embeddings.patch_embedding.weight"][-1]
    layers = 1 + max(
        int(n.split(".layers.")[1].split(".")[0]) for n in shapes if n.startswith(f"{TOWER}encoder")
    )
    if f"{TOWER}post_layernorm.weight" not in shapes:
        # Written by us: without the layers that nobody reads.
        layers -= 1 + found.get("mm_vision_select_layer", -2)
    width = places[1]
    mlp = shapes[f"{TOWER}encoder.layers.0.mlp.fc1.weight"][0]
    return ClipConfig(grid * patch, patch, width, layers, max(1, width // 64), mlp)


def stock_part(
    name: str, config: ModelConfig, found: Mapping[str, tuple[int, ...]] | None = None
) -> hub.StockPart:
    """One of PARTS of a model; `found` are the names and shapes of the stock folder that is read, if one is.

    Raises:
        ConfigError: that part of this model is not laid out like the stock one.
    """
    c = config
    if name == "llm":
        head = found is None or "lm_head.weight" in found
        rows = None if found is None else found.get("model.embed_tokens.weight", (c.vocab,))[0]
        return hub.llama(c.backbone, rows=rows, added=max(0, c.vocab - (rows or c.vocab)), head=head)
    if name == "clip":
        if c.tower.kind != "clip":
            raise ConfigError(f"config.model.tower.kind is {c.tower.kind!r}: it has no CLIP in it")
        return hub.clip(c.tower.clip.run, "tower/clip/")
    raise ConfigError(f"{name!r} is no part of a unified_mllm model: {', '.join(PARTS)}")


def _require_release_layout(c: ModelConfig) -> None:
    odd = {
        "tower.kind": (c.tower.kind, "clip"),
        "backbone.qk_norm": (c.backbone.qk_norm, False),
        "backbone.qkv_bias": (c.backbone.qkv_bias, False),
        "backbone.gated_mlp": (c.backbone.gated_mlp, True),
        "backbone.synchronizer": (c.backbone.synchronizer, None),
        "backbone.attention_scale": (c.backbone.attention_scale, 1.0),
    }
    require("the release", odd)


def _rules(c: ModelConfig) -> Iterator[Rule]:
    yield Rule("model.embed_tokens.weight", "embed/table")
    yield Rule("lm_head.weight", "head/base/kernel", "linear")
    yield from stock.llama("model.", "backbone/", c.backbone)
    yield from stock.clip_vision(TOWER, "tower/clip/", c.tower.clip.run)
    for k in range(len(c.adapter) + 1):
        # An activation stands between two layers; a single layer has no number.
        theirs = f"{PROJECTOR}{2 * k}" if c.adapter else PROJECTOR.removesuffix(".")
        yield from stock.weight(theirs, f"adapter/layers/{k}")
    if c.backbone.experts is not None:
        yield from _experts(c)
    if c.masks is not None:
        yield from stock.weight("model.text_hidden_fcs.0.0", "masks/query_in")
        yield from stock.weight("model.text_hidden_fcs.0.2", "masks/query_out")
        if c.masks.encoder is None:
            yield from stock.sam_neck(f"{SAM}image_encoder.neck.", "masks/neck/")
        else:
            yield from stock.sam_encoder(f"{SAM}image_encoder.", "masks/encoder/", c.masks.encoder)
        yield from stock.sam_prompts(f"{SAM}prompt_encoder.", "masks/prompts/")
        yield from stock.sam_decoder(f"{SAM}mask_decoder.", "masks/decoder/", c.masks.decoder)


def _experts(c: ModelConfig) -> Iterator[Rule]:
    """As LoRAMoE's code names them."""
    for i in range(c.backbone.layers):
        for name in ("gate", "up", "down"):
            theirs, ours = f"model.layers.{i}.mlp.{name}_proj.", f"backbone/layers/mlp/experts/{name}/"
            yield Rule(f"{theirs}lora_route.weight", f"{ours}route[{i}]", "linear")
            for n in range(c.backbone.experts.experts):
                yield Rule(f"{theirs}lora_A{n}.weight", f"{ours}a[{i},:,{n}]", "linear")
                yield Rule(f"{theirs}lora_B{n}.weight", f"{ours}b[{i},{n}]", "linear")
