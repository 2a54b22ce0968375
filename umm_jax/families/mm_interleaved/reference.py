"""The sizes of a folder written by the reference implementation, as a config of ours.

Such a folder has a state dict and a ``config.json`` with sections ``config`` (llm, clip, unet, vae,
vt_perceiver, dec_perceiver and a few numbers), ``fixed_constants`` and ``noise_scheduler``. What the shapes
of tensors tell is taken from them; the config gives the rest (heads, epsilons, sides, schedule).
"""

from collections.abc import Mapping
from typing import Any

from umm_jax.errors import CheckpointError
from umm_jax.families.mm_interleaved.config import ContextConfig, ModelConfig
from umm_jax.families.mm_interleaved.stream import LayoutConfig
from umm_jax.models.autoencoder import AutoencoderConfig
from umm_jax.models.backbone import BackboneConfig
from umm_jax.models.resampler import ResamplerConfig
from umm_jax.models.sampling import ScheduleConfig
from umm_jax.models.synchronizer import SynchronizerConfig
from umm_jax.models.tower import TowerConfig
from umm_jax.models.unet import UNetConfig
from umm_jax.models.unet_sync import UNetSyncConfig
from umm_jax.models.vision import ClipConfig
from umm_jax.models.vision_adapter import ClipAdapterConfig

Shapes = Mapping[str, tuple[int, ...]]

# How the release spells a stream: the two tokens it adds to Vicuna's vocabulary, and the end of a sequence.
# It was trained on documents without turns; the words that open one are those Vicuna knows.
RELEASED_SPELLING = {
    "soi": "<|beginofimage|>",
    "image": "<|image|>",
    "prefixes": {"system": "", "user": "USER:", "assistant": "ASSISTANT:"},
    "turn_end": "</s>",
    "box_format": "text",
}


def is_reference(found: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of this kind."""
    return isinstance(found.get("config"), Mapping) and {"llm", "clip"} <= set(found["config"])


def reference_config(found: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    """The config of a folder whose ``config.json`` holds `found` and whose state dict has `shapes`.

    Raises:
        CheckpointError: a value or tensor that is needed is not there; the message names it.
    """
    try:
        return _build(found["config"], found, shapes)
    except KeyError as error:
        raise CheckpointError(
            f"the reference's config.json or state dict has no {error.args[0]!r}; it is needed to tell the "
            "sizes of the model"
        ) from None


def release_config() -> ModelConfig:
    """The released model itself: its sizes are our defaults."""
    return ModelConfig(layout=LayoutConfig(**RELEASED_SPELLING))


def _build(c: Mapping[str, Any], found: Mapping[str, Any], shapes: Shapes) -> ModelConfig:
    fixed, llm = found["fixed_constants"], c["llm"]
    adapter = _adapter(c["clip"], fixed, shapes)
    width, maps, levels = llm["hidden_size"], adapter.map_width, len(c["unet"]["block_out_channels"])
    backbone = BackboneConfig(
        vocab=shapes["mm_decoder.embed_tokens.weight"][0],
        width=width,
        layers=llm["num_hidden_layers"],
        heads=llm["num_attention_heads"],
        mlp=llm["intermediate_size"],
        norm_eps=llm["rms_norm_eps"],
        rope_base=llm.get("rope_theta", 10000.0),
        sync_every=c["cross_attention_frequency"],
        synchronizer=SynchronizerConfig(
            d_query=width,
            d_maps=maps,
            d_out=width,
            sides=tuple(c["spatial_shapes"]),
            base=float(fixed["llm_mmfs_base_spatial_shape"]),
            **_core("mm_decoder.layers.0.llama_cross_attn.attn.", len(c["spatial_shapes"]), shapes),
        ),
    )
    unet = UNetConfig(
        side=c["image_size_dec"] // 2 ** (len(c["vae"]["block_out_channels"]) - 1),
        in_channels=c["vae"]["latent_channels"],
        out_channels=c["vae"]["latent_channels"],
        widths=tuple(c["unet"]["block_out_channels"]),
        heads=_per_level(
            c["unet"]["attention_head_dim"], levels
        ),  # the library's name; the numbers are heads
        attention=tuple("CrossAttn" in kind for kind in found["unet_topology"]["down_block_types"]),
        context_width=c["unet"]["cross_attention_dim"],
        layers_per_block=c["unet"].get("layers_per_block", 2),
        norm_groups=c["unet"]["norm_num_groups"],
    )
    return ModelConfig(
        layout=LayoutConfig(
            image_size=adapter.image_size,
            target_size=c["image_size_dec"],
            image_tokens=c["num_img_token"],
            soi_id=fixed["special_tokens"]["soi"],
            **RELEASED_SPELLING,
        ),
        backbone=backbone,
        tower=TowerConfig(clip_adapter=adapter),
        visual_resampler=_resampler(c["vt_perceiver"], fixed),
        context=ContextConfig(length=c["seq_len"]),
        context_resampler=_resampler(c["dec_perceiver"], fixed),
        unet=unet,
        unet_sync=UNetSyncConfig(
            d_maps=maps,
            sides=adapter.sides,
            units=tuple(fixed["unet_mmfs_spatial_shapes"]),
            position_grid=fixed["unet_mmfs_pos_embed_grid"],
            **_core("image_decoder.decoder.mmfs_module.mmfs_mid_block.mmfs.", len(adapter.sides), shapes),
        ),
        autoencoder=AutoencoderConfig(
            widths=tuple(c["vae"]["block_out_channels"]),
            layers_per_block=c["vae"].get("layers_per_block", 2),
            latent_channels=c["vae"]["latent_channels"],
            norm_groups=c["vae"]["norm_num_groups"],
            scale=found.get("vae_topology", {}).get("scaling_factor"),
        ),
        schedule=_schedule(found["noise_scheduler"]),
        added_tokens=shapes["text_decoder.head_new.weight"][0],
        uncond_prob=fixed["uncond_prob"],
    )


def _per_level(value: int | list[int], levels: int) -> tuple[int, ...]:
    """One number for all levels, or one for each."""
    return (value,) * levels if isinstance(value, int) else tuple(value)


def _core(prefix: str, levels: int, shapes: Shapes) -> dict[str, int]:
    """Heads, points and widths of a synchronizer: offsets are 2 H P wide, logits H levels (P + 1)."""
    both = shapes[f"{prefix}sampling_offsets.weight"][0] // 2
    heads = shapes[f"{prefix}attention_weights.weight"][0] // levels - both
    return {
        "heads": heads,
        "points": both // heads,
        "d_values": shapes[f"{prefix}value_proj.weight"][0],
        "max_images": shapes[f"{prefix}query_relpos.weight"][0],
    }


def _adapter(clip: Mapping[str, Any], fixed: Mapping[str, Any], shapes: Shapes) -> ClipAdapterConfig:
    own = "visual_tokenizer.encoder.vision_model.adapter_"
    extractor = f"{own}interactions.0.extractor"
    blocks = 1 + max(
        int(name[len(f"{own}interactions.") :].partition(".")[0])
        for name in shapes
        if name.startswith(f"{own}interactions.")
    )
    extras = f"{own}interactions.{blocks - 1}.extra_extractors."
    return ClipAdapterConfig(
        clip=ClipConfig(
            image_size=clip["image_size"],
            patch=clip["patch_size"],
            width=clip["hidden_size"],
            layers=clip["num_hidden_layers"],
            heads=clip["num_attention_heads"],
            mlp=clip["intermediate_size"],
            eps=clip["layer_norm_eps"],
        ),
        blocks=blocks,
        extra=len({name[len(extras) :].partition(".")[0] for name in shapes if name.startswith(extras)}),
        heads=shapes[f"{extractor}.attn.attention_weights.weight"][0] // fixed["adapter_n_points"],
        points=fixed["adapter_n_points"],
        value_ratio=shapes[f"{extractor}.attn.value_proj.weight"][0] / clip["hidden_size"],
        stem_width=shapes[f"{own}spm.stem.0.weight"][0],
        position_grid=fixed["visual_pos_embed_grid"],
        mlp_ratio=shapes[f"{extractor}.ffn.fc1.weight"][0] / clip["hidden_size"],
        eps=fixed["adapter_layernorm_eps"],
    )


def _resampler(c: Mapping[str, Any], fixed: Mapping[str, Any]) -> ResamplerConfig:
    return ResamplerConfig(
        d_in=c["encoder_hidden_size"],
        d_out=c["hidden_size"],
        queries=c["num_queries"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        mlp=c["intermediate_size"],
        cross_every=c["cross_attention_frequency"],
        qk_norm=c.get("qk_normalization", False),
        dropout=fixed["perceiver_dropout"],
        eps=fixed["qformer_layer_norm_eps"],
    )


def _schedule(c: Mapping[str, Any]) -> ScheduleConfig:
    kinds = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "velocity"}
    return ScheduleConfig(
        kind="ddpm",
        prediction=kinds[c["prediction_type"]],
        train_steps=c["num_train_timesteps"],
        beta_kind=c["beta_schedule"],
        beta_start=c["beta_start"],
        beta_end=c["beta_end"],
        steps_offset=c["steps_offset"],
    )
