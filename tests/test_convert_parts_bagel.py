"""A mixture begun from stock parts: Qwen2 in both groups, SigLIP, FLUX's autoencoder under both its names."""

import chatumm_toy as toy
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from umm_jax import config as configs
from umm_jax.convert.from_parts import from_parts
from umm_jax.convert.to_torch import to_torch
from umm_jax.errors import ConfigError
from umm_jax.families.chatumm import weights
from umm_jax.models.navit import NaViT, NaViTConfig
from umm_jax.train.optimizer import unflatten
from umm_jax.train.parts import PartReader

torch = pytest.importorskip("torch", reason="stock classes need torch")
transformers = pytest.importorskip("transformers", reason="stock classes of Qwen2 and SigLIP")
diffusers = pytest.importorskip("diffusers", reason="stock class of the autoencoder")

VISION = NaViTConfig(patch=4, grid=4, width=24, layers=2, heads=3, mlp=40)
SECTION = dict(
    layout=dict(
        latent=dict(longest=16, shortest=8, stride=4),
        vision=dict(longest=16, shortest=8, stride=4),
        latent_grid=4,
        vision_grid=4,
    ),
    mixture=dict(vocab=64, width=32, layers=2, heads=4, kv_heads=2, mlp=48),
    vision=vars(VISION),
    autoencoder=dict(
        widths=[8, 16], layers_per_block=1, latent_channels=4, norm_groups=4, quant=False, scale=0.3611
    ),
    latent_patch=2,
)
RUN = configs.RunConfig(family="chatumm", model=SECTION)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    base = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    qwen = transformers.Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(qwen).save_pretrained(base / "qwen")
    vision = transformers.SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=16,
        patch_size=4, layer_norm_eps=1e-6,
    )  # fmt: skip
    transformers.SiglipVisionModel(vision).save_pretrained(base / "siglip")
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611,
    ).save_pretrained(base / "vae")  # fmt: skip
    return base


@pytest.fixture(scope="module")
def begun(stock, tmp_path_factory):
    out = tmp_path_factory.mktemp("begun") / "run"
    parts = {"llm": stock / "qwen", "vit": stock / "siglip", "vae": stock / "vae"}
    from_parts(RUN, out, parts, say=lambda _: None)
    reader = PartReader(out / "checkpoints")
    return out, {path: reader.read(path) for path in reader.arrays}


def test_both_groups_begin_as_the_language_model(stock, begun):
    found = begun[1]
    qwen = transformers.Qwen2ForCausalLM.from_pretrained(stock / "qwen").state_dict()
    for group in ("understanding", "generation"):
        layers = f"mixture/layers/{group}"
        up = np.stack([qwen[f"model.layers.{i}.mlp.up_proj.weight"].numpy().T for i in range(2)])
        np.testing.assert_array_equal(found[f"{layers}/mlp/up/kernel"], up)
        bias = np.stack([qwen[f"model.layers.{i}.self_attn.k_proj.bias"].numpy() for i in range(2)])
        np.testing.assert_array_equal(found[f"{layers}/attention/k/bias"], bias)
        assert (found[f"{layers}/attention/q_norm/scale"] == 1).all()
        np.testing.assert_array_equal(found[f"mixture/{group}_norm/scale"], qwen["model.norm.weight"].numpy())
    np.testing.assert_array_equal(found["head/base/kernel"], qwen["lm_head.weight"].numpy().T)


def test_the_encoder_gives_siglips_hidden_states(stock, begun):
    model = transformers.SiglipVisionModel.from_pretrained(stock / "siglip").eval()
    pixels = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(pixels)).last_hidden_state.numpy()
    prefix = "vision/"
    params = unflatten({p.removeprefix(prefix): a for p, a in begun[1].items() if p.startswith(prefix)})
    module = nnx.merge(nnx.split(NaViT(VISION, rngs=nnx.Rngs(0)))[0], nnx.State(params))
    tiles = pixels.transpose(0, 2, 3, 1).reshape(2, 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    place, image = np.tile(np.arange(16), 2)[None], np.repeat([1, 2], 16)[None]
    ours = module(jnp.asarray(tiles.reshape(1, 32, -1)), jnp.asarray(place), jnp.asarray(image))
    np.testing.assert_allclose(ours[0].reshape(2, 16, -1), theirs, rtol=1e-4, atol=1e-4)


def test_the_autoencoder_is_read_under_both_names(stock, begun, tmp_path):
    """Diffusers' folder, and a file as its own code names the tensors."""
    found = begun[1]
    config = configs.from_dict(toy.FAMILY.config.ModelConfig, SECTION, "config.model")
    ours = {path: a.shape for path, a in found.items()}
    table = weights.stock_part("vae", config, {"encoder.mid.block_1.norm1.weight": ()}).table
    from umm_jax.weights.table import TURNS

    file = {r.theirs: np.ascontiguousarray(TURNS[r.how].theirs(found[r.path][r.index])) for r in table.rules}
    assert "decoder.up.1.upsample.conv.weight" in file and ours
    save_file(file, tmp_path / "ae.safetensors")
    from_parts(RUN, tmp_path / "run", {"vae": tmp_path / "ae.safetensors"}, say=lambda _: None)
    reader = PartReader(tmp_path / "run" / "checkpoints")
    assert reader.arrays and all(path.startswith("autoencoder/") for path in reader.arrays)
    for path in reader.arrays:
        np.testing.assert_array_equal(reader.read(path), found[path])


def test_a_longer_encoder_and_a_smaller_table_are_fitted(stock, tmp_path):
    model = SECTION | {
        "vision": vars(VISION) | {"layers": 1, "grid": 6},
        "layout": SECTION["layout"] | {"vision_grid": 6},
    }
    run = configs.RunConfig(family="chatumm", model=model)
    from_parts(run, tmp_path / "run", {"vit": stock / "siglip"}, say=lambda _: None)
    reader = PartReader(tmp_path / "run" / "checkpoints")
    table = reader.read("vision/position")
    assert table.shape == (36, 24) and reader.arrays["vision/layers/up/kernel"][0] == (1, 24, 40)
    name = next(p for p in (stock / "siglip").glob("*.safetensors"))
    theirs = next(a for n, a in load_file(name).items() if n.endswith("position_embedding.weight"))
    np.testing.assert_allclose(table.mean(0), theirs.mean(0), atol=0.05)


def test_what_cannot_be_is_named(stock, begun, tmp_path):
    with pytest.raises(ConfigError, match="llm cannot be written as a stock folder: it has norms of heads"):
        to_torch(begun[0], tmp_path / "out", part="llm", say=lambda _: None)
    with pytest.raises(ConfigError, match="'unet' is no part of a chatumm model"):
        from_parts(RUN, tmp_path / "run", {"unet": stock / "vae"}, say=lambda _: None)
    other = SECTION | {"mixture": SECTION["mixture"] | {"norm_eps": 1e-5}}
    with pytest.raises(ConfigError, match="rms_norm_eps is 1e-06, the model has 1e-05"):
        from_parts(
            configs.RunConfig(family="chatumm", model=other),
            tmp_path / "run",
            {"llm": stock / "qwen"},
            say=lambda _: None,
        )
    assert not (tmp_path / "run").exists()
