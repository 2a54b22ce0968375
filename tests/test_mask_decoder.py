"""SAM's prompt encoder and mask decoder: sizes of the release, and its numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig, PromptEncoder
from umm_jax.weights import stock
from umm_jax.weights.table import Table, compare

SMALL = dict(width=32, depth=2, heads=4, mlp=48, reduced=16, masks=3, iou_hidden=24)


def count(make) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param)))


def test_parameters_of_the_published_size():
    assert count(lambda: MaskDecoder(MaskDecoderConfig(), rngs=nnx.Rngs(0))) == 4_058_340
    assert count(lambda: PromptEncoder(rngs=nnx.Rngs(0))) == 6_220


def test_shapes():
    encoder, decoder = (
        PromptEncoder(32, rngs=nnx.Rngs(0)),
        MaskDecoder(MaskDecoderConfig(**SMALL), rngs=nnx.Rngs(1)),
    )
    prompts = encoder.boxes(jnp.array([[[0.1, 0.2, 0.5, 0.6]], [[0.3, 0.3, 0.4, 0.9]]]), 64)
    logits, iou = decoder(jnp.ones((2, 4, 6, 32)), encoder.grid(4, 6), prompts)
    assert logits.shape == (2, 3, 16, 24) and iou.shape == (2, 3)


def test_a_query_finds_what_another_does_not():
    """Prompts change the masks, and those of one picture do not reach another."""
    encoder, decoder = (
        PromptEncoder(32, rngs=nnx.Rngs(0)),
        MaskDecoder(MaskDecoderConfig(**SMALL), rngs=nnx.Rngs(1)),
    )
    features = jax.random.normal(jax.random.key(0), (2, 4, 4, 32))
    queries = jax.random.normal(jax.random.key(1), (2, 1, 32))
    logits, _ = decoder(features, encoder.grid(4, 4), queries)
    changed, _ = decoder(features, encoder.grid(4, 4), queries.at[1].add(1.0))
    np.testing.assert_array_equal(logits[0], changed[0])
    assert not np.allclose(logits[1], changed[1], atol=1e-3)


def test_settings():
    with pytest.raises(ConfigError, match="multiple of 8"):
        MaskDecoderConfig(width=20, heads=4)


# --- against the published code -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    torch = pytest.importorskip("torch", reason="the published code is PyTorch's")
    transformers = pytest.importorskip("transformers")
    from transformers.models.sam import modeling_sam

    torch.manual_seed(0)
    decoder = transformers.SamMaskDecoderConfig(
        hidden_size=32,
        mlp_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_downsample_rate=2,
        num_multimask_outputs=2,
        iou_head_hidden_dim=24,
    )
    prompts = transformers.SamPromptEncoderConfig(hidden_size=32, image_size=64, patch_size=16)
    vision = transformers.SamVisionConfig(hidden_size=32, num_pos_feats=16)
    config = transformers.SamConfig(
        vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder
    )
    found = modeling_sam.SamMaskDecoder(config.mask_decoder_config), modeling_sam.SamPromptEncoder(config)
    for model in found:
        for value in model.parameters():
            torch.nn.init.normal_(value, std=0.2)
    return found


# transformers' names -> those of SAM's own code, which the checkpoints have.
RENAMED = {
    r"\.layer_norm(\d)\.": r".norm\1.",
    r"layer_norm_final_attn": "norm_final_attn",
    r"upscale_conv1": "output_upscaling.0",
    r"upscale_layer_norm": "output_upscaling.1",
    r"upscale_conv2": "output_upscaling.3",
    r"(_mlps\.\d|_head)\.layers\.0\.": r"\1.layers.1.",
    r"\.proj_in\.": ".layers.0.",
    r"\.proj_out\.": ".layers.2.",
    r"shared_embedding\.positional_embedding": "pe_layer.positional_encoding_gaussian_matrix",
    r"^point_embed\.": "point_embeddings.",
    r"mask_embed\.conv1": "mask_downscaling.0",
    r"mask_embed\.norm1": "mask_downscaling.1",
    r"mask_embed\.conv2": "mask_downscaling.3",
    r"mask_embed\.norm2": "mask_downscaling.4",
    r"mask_embed\.conv3": "mask_downscaling.6",
}


def original(name: str) -> str:
    for theirs, own in RENAMED.items():
        name = re.sub(theirs, own, name)
    return name


def ours(published) -> tuple[MaskDecoder, PromptEncoder]:
    """Ours with the published weights, read by the table that reads checkpoints."""
    config = MaskDecoderConfig(**SMALL)
    made = MaskDecoder(config, rngs=nnx.Rngs(0)), PromptEncoder(32, rngs=nnx.Rngs(1))
    rules = tuple(stock.sam_decoder("", "", config)), tuple(stock.sam_prompts("", ""))
    for module, model, rows in zip(made, published, rules):
        tensors = {original(name): value.numpy() for name, value in model.state_dict().items()}
        table, flat = Table(rows), dict(nnx.to_flat_state(nnx.state(module)))
        shapes = {"/".join(map(str, path)): value[...].shape for path, value in flat.items()}
        table.check(shapes)
        assert compare(table, shapes, {name: value.shape for name, value in tensors.items()}) == []
        filled = table.fill(shapes, tensors.__getitem__)
        for path, value in flat.items():
            value[...] = jnp.asarray(filled["/".join(map(str, path))])
    return made


def test_the_decoder_computes_what_the_published_one_does(published):
    import torch

    decoder, encoder = ours(published)
    rng = np.random.default_rng(0)
    features, dense = rng.normal(size=(2, 4, 4, 4, 32)).astype(np.float32)[:, :2]
    prompts = rng.normal(size=(2, 3, 32)).astype(np.float32)
    places = np.asarray(encoder.grid(4, 4))
    nchw = [torch.tensor(x.transpose(0, 3, 1, 2)) for x in (features, dense, np.stack([places] * 2))]
    with torch.no_grad():
        masks, iou = published[0](
            image_embeddings=nchw[0],
            image_positional_embeddings=nchw[2],
            sparse_prompt_embeddings=torch.tensor(prompts)[:, None],
            dense_prompt_embeddings=nchw[1],
            multimask_output=True,
        )[:2]
        first = published[0](
            image_embeddings=nchw[0],
            image_positional_embeddings=nchw[2],
            sparse_prompt_embeddings=torch.tensor(prompts)[:, None],
            dense_prompt_embeddings=nchw[1],
            multimask_output=False,
        )[0]
    logits, ours_iou = decoder(jnp.asarray(features + dense), jnp.asarray(places), jnp.asarray(prompts))
    np.testing.assert_allclose(logits[:, 1:], masks[:, 0].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits[:, :1], first[:, 0].numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours_iou[:, 1:], iou[:, 0].numpy(), rtol=1e-4, atol=1e-4)


def test_prompts_are_what_the_published_encoder_makes(published):
    import torch

    _, encoder = ours(published)
    boxes = np.array([[[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]]], np.float32)
    points = np.array([[[0.25, 0.5], [0.75, 0.125], [0.0, 0.0]]], np.float32)
    labels, mask = (
        np.array([[1, 0, -1]]),
        np.random.default_rng(1).normal(size=(1, 16, 16)).astype(np.float32),
    )
    with torch.no_grad():
        sparse, dense = published[1](
            input_points=None,
            input_labels=None,
            input_boxes=torch.tensor(boxes * 64),
            input_masks=torch.tensor(mask)[:, None],
        )
        marked, none = published[1](
            input_points=torch.tensor(points * 64)[:, None],
            input_labels=torch.tensor(labels)[:, None],
            input_boxes=None,
            input_masks=None,
        )
    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        encoder.boxes(jnp.asarray(boxes), 64)[0], sparse.numpy().reshape(4, 32), **close
    )
    np.testing.assert_allclose(
        encoder.mask(jnp.asarray(mask))[0], dense[0].numpy().transpose(1, 2, 0), **close
    )
    # The published one adds a point that is none where there is no box.
    found = encoder.points(jnp.asarray(points), jnp.asarray(labels), 64)[0]
    np.testing.assert_allclose(found, marked.numpy().reshape(-1, 32)[:3], **close)
    np.testing.assert_allclose(encoder.no_mask[...], none[0, :, 0, 0].detach().numpy(), **close)
