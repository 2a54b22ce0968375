"""SAM's prompt encoder and mask decoder: sizes of the release, and its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.mask_decoder import MaskDecoder, MaskDecoderConfig, PromptEncoder

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


def _set(module, values: dict[str, np.ndarray], names: dict[str, str]) -> None:
    """Copies `values` by a table of our attribute paths -> theirs, without their ending."""
    for ours, theirs in names.items():
        target = module
        for step in ours.split("."):
            target = target[int(step)] if step.isdigit() else getattr(target, step)
        weight = values[f"{theirs}.weight"]
        if hasattr(target, "kernel"):
            target.kernel[...] = weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)
        else:
            target.scale[...] = weight
        target.bias[...] = values[f"{theirs}.bias"]


def ours(published) -> tuple[MaskDecoder, PromptEncoder]:
    decoder, encoder = (
        MaskDecoder(MaskDecoderConfig(**SMALL), rngs=nnx.Rngs(0)),
        PromptEncoder(32, rngs=nnx.Rngs(1)),
    )
    d, e = ({k: v.numpy() for k, v in model.state_dict().items()} for model in published)
    names = {}
    for k in range(2):
        at = f"transformer.layers.{k}"
        for own, their in (
            ("own", "self_attn"),
            ("to_map", "cross_attn_token_to_image"),
            ("from_map", "cross_attn_image_to_token"),
        ):
            names |= {f"blocks.{k}.{own}.{p}": f"{at}.{their}.{p}_proj" for p in ("q", "k", "v", "out")}
        names |= {f"blocks.{k}.norms.{n}": f"{at}.layer_norm{n + 1}" for n in range(4)}
        names |= {f"blocks.{k}.up": f"{at}.mlp.lin1", f"blocks.{k}.down": f"{at}.mlp.lin2"}
    names |= {f"last.{p}": f"transformer.final_attn_token_to_image.{p}_proj" for p in ("q", "k", "v", "out")}
    names |= {"last_norm": "transformer.layer_norm_final_attn", "larger_norm": "upscale_layer_norm"}
    heads = [(f"vectors.{k}", f"output_hypernetworks_mlps.{k}") for k in range(3)] + [
        ("iou", "iou_prediction_head")
    ]
    for own, their in heads:
        names |= {
            f"{own}.layers.0": f"{their}.proj_in",
            f"{own}.layers.1": f"{their}.layers.0",
            f"{own}.layers.2": f"{their}.proj_out",
        }
    _set(decoder, d, names)
    decoder.iou_token[...], decoder.mask_tokens[...] = d["iou_token.weight"], d["mask_tokens.weight"]
    for own, their in (("larger", "upscale_conv1"), ("largest", "upscale_conv2")):
        getattr(decoder, own)[...] = d[f"{their}.weight"].transpose(0, 2, 3, 1)
        getattr(decoder, f"{own}_bias")[...] = d[f"{their}.bias"]
    _set(
        encoder,
        e,
        {
            "mask_in": "mask_embed.conv1",
            "mask_mid": "mask_embed.conv2",
            "mask_out": "mask_embed.conv3",
            "mask_in_norm": "mask_embed.layer_norm1",
            "mask_mid_norm": "mask_embed.layer_norm2",
        },
    )
    encoder.frequencies[...] = e["shared_embedding.positional_embedding"]
    encoder.kinds[...] = np.concatenate([e[f"point_embed.{k}.weight"] for k in range(4)])
    encoder.nowhere[...], encoder.no_mask[...] = (
        e["not_a_point_embed.weight"][0],
        e["no_mask_embed.weight"][0],
    )
    return decoder, encoder


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
