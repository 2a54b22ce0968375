"""The ancestors' names of UnifiedMLLM's tensors: complete, of the published shapes, and the same numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
import unified_toy as toy
from flax import nnx

from umm_jax.errors import CheckpointError, ConfigError
from umm_jax.models.backbone import BackboneConfig
from umm_jax.models.layers import Keys
from umm_jax.models.lora_moe import LoRAMoEConfig
from umm_jax.models.sam_encoder import SamEncoderConfig
from umm_jax.models.tower import TowerConfig
from umm_jax.models.vision import ClipConfig, ClipTowerConfig
from umm_jax.weights.table import compare

WEIGHTS, CONFIG = toy.FAMILY.weights, toy.FAMILY.config
BIG = dict(vocab=32003, width=4096, layers=32, heads=32, mlp=11008, norm_eps=1e-5)


def shapes_of(config) -> dict:
    state = nnx.split(nnx.eval_shape(lambda: toy.FAMILY.model.build(config, Keys(0))))[1]
    return {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}


def test_every_parameter_has_a_name_and_the_published_shape():
    config = CONFIG.ModelConfig(backbone=BackboneConfig(**BIG, experts=LoRAMoEConfig()))
    ours, table = shapes_of(config), WEIGHTS.table(config)
    table.check(ours)
    found = table.theirs(ours)
    published = {
        "model.embed_tokens.weight": (32003, 4096),
        "lm_head.weight": (32003, 4096),
        "model.layers.31.mlp.down_proj.weight": (4096, 11008),
        "model.layers.31.mlp.down_proj.lora_route.weight": (8, 11008),
        "model.layers.31.mlp.down_proj.lora_A7.weight": (4, 11008),
        "model.layers.31.mlp.down_proj.lora_B7.weight": (4096, 4),
        "model.mm_projector.0.weight": (4096, 1024),
        "model.mm_projector.2.weight": (4096, 4096),
        "model.text_hidden_fcs.0.2.weight": (256, 4096),
        "model.visual_model.mask_decoder.mask_tokens.weight": (4, 256),
        "model.visual_model.mask_decoder.output_upscaling.0.weight": (256, 64, 2, 2),
        "model.visual_model.mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "model.visual_model.mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight": (
            128,
            256,
        ),
        "model.visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "model.visual_model.prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "model.visual_model.prompt_encoder.point_embeddings.3.weight": (1, 256),
    }
    assert {name: found.get(name) for name in published} == published
    assert f"{WEIGHTS.TOWER}encoder.layers.22.mlp.fc1.weight" in found
    assert f"{WEIGHTS.TOWER}encoder.layers.23.mlp.fc1.weight" not in found


def test_lisa_is_covered_and_says_its_sizes():
    """At the published size: every tensor of SAM's has its place, and the shapes say which SAM it is."""
    masks = CONFIG.MaskConfig(encoder=SamEncoderConfig())
    layout = toy.FAMILY.stream.LayoutConfig(large_size=1024, dialect="lisa")
    config = CONFIG.ModelConfig(backbone=BackboneConfig(**BIG), masks=masks, layout=layout)
    ours, table = shapes_of(config), WEIGHTS.table(config)
    table.check(ours)
    found = table.theirs(ours)
    assert found[f"{WEIGHTS.SAM}image_encoder.blocks.31.attn.rel_pos_w"] == (127, 80)
    assert found[f"{WEIGHTS.SAM}image_encoder.blocks.30.attn.qkv.weight"] == (3840, 1280)
    assert found[f"{WEIGHTS.SAM}image_encoder.neck.2.weight"] == (256, 256, 3, 3)
    told = dict(
        model_type="llava",
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=11008,
        rms_norm_eps=1e-5,
        mm_vision_tower="openai/clip-vit-large-patch14-336",
    )
    assert WEIGHTS.config_of(told, found) == config


def test_what_groundinggpt_has_beside():
    config = WEIGHTS.release_config()
    ours, table = shapes_of(config), WEIGHTS.table(config)
    found = {name.replace("mm_projector", "mm_vision_projector"): s for name, s in table.theirs(ours).items()}
    found |= {
        "model.visual_encoder.blocks.0.attn.qkv.weight": (4224, 1408),
        "model.llama_proj.weight": (4096, 768),
        "model.video_Qformer.bert.encoder.layer.0.output.dense.weight": (768, 3072),
        "model.video_query_tokens": (1, 64, 768),
        "model.audio_llama_proj.bias": (4096,),
        f"{WEIGHTS.TOWER}encoder.layers.23.mlp.fc1.weight": (4096, 1024),
    }
    found = {table.canonical(name): shape for name, shape in found.items()}
    assert compare(table, ours, found) == []
    found["model.unknown.weight"] = (1,)
    assert [m.name for m in compare(table, ours, found)] == ["model.unknown.weight"]


def test_a_checkpoint_says_its_sizes():
    found = dict(
        model_type="llava_llama",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        mm_vision_tower="openai/clip-vit-large-patch14-336",
        mm_vision_select_layer=-2,
    )
    shapes = {"model.embed_tokens.weight": (50, 32), "model.mm_projector.2.weight": (32, 32)}
    config = WEIGHTS.config_of(found, shapes)
    assert config.layout.image_tokens == 576 and config.adapter == (32,) and config.masks is None
    assert config.backbone.vocab == 50 and config.tower.clip.run.layers == 23
    assert WEIGHTS.config_of(found, {**shapes, f"{WEIGHTS.SAM}mask_decoder.iou_token.weight": (1, 256)}).masks
    assert WEIGHTS.config_of({**found, "model_type": "mistral"}, shapes) is None
    del found["hidden_size"]
    with pytest.raises(CheckpointError, match="hidden_size"):
        WEIGHTS.config_of(found, shapes)


def test_another_layout_has_no_names():
    with pytest.raises(ConfigError, match="tower.kind is 'pyramid'"):
        WEIGHTS.table(toy.config())


# --- against the published code -----------------------------------------------------------------------------


def test_numbers_of_llava():
    """A LLaVA of random weights in transformers and ours: the same logits for a picture and words."""
    torch = pytest.importorskip("torch", reason="the published code is PyTorch's")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=1,
        image_size=28,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=64,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=49, image_seq_length=4
    )
    published = transformers.LlavaForConditionalGeneration(config).eval()
    for value in published.parameters():
        torch.nn.init.normal_(value, std=0.15)

    names = {
        "model.language_model.": "model.",
        "model.vision_tower.vision_model.": WEIGHTS.TOWER,
        "model.vision_tower.": WEIGHTS.TOWER,
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
    }
    tensors = {}
    for name, value in published.state_dict().items():
        for theirs, original in names.items():
            if name.startswith(theirs):
                name = original + name.removeprefix(theirs)
                break
        tensors[name] = value.numpy()
    model_config = CONFIG.ModelConfig(
        layout=toy.FAMILY.stream.LayoutConfig(image_size=28, image_tokens=4),
        backbone=BackboneConfig(vocab=50, width=32, layers=2, heads=4, mlp=48, norm_eps=1e-5),
        tower=TowerConfig(kind="clip", clip=ClipTowerConfig(ClipConfig(28, 14, 64, 3, 1, 80))),
        adapter=(32,),
        masks=None,
    )
    model = toy.model(model_config)
    table = WEIGHTS.table(model_config)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    ours = {"/".join(map(str, path)): v[...].shape for path, v in flat.items()}
    assert compare(table, ours, {name: v.shape for name, v in tensors.items()}) == []
    filled = table.fill(ours, lambda name: tensors[name])
    for path, value in flat.items():
        value[...] = jnp.asarray(filled["/".join(map(str, path))])

    pixels = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 3), np.uint8)
    ids = np.array([[1, 7, 49, 49, 49, 49, 8, 9, 3]])
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    normal = torch.tensor((pixels / 255 - mean) / std, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        wanted = published(input_ids=torch.tensor(ids), pixel_values=normal).logits.numpy()
    visual, _ = model.look({"pixels": jnp.asarray(pixels)[None]})
    image = np.where(ids == 49, 0, -1)
    slot = np.maximum(np.arange(9) - 2, 0)[None]
    x = model.embed_tokens(jnp.asarray(ids), jnp.asarray(image), jnp.asarray(slot), visual)
    positions = jnp.arange(9)[None]
    hidden, _ = model.backbone(x, positions, positions[:, :, None] >= positions[:, None])
    np.testing.assert_allclose(model.head(hidden), wanted, atol=2e-4, rtol=1e-3)
