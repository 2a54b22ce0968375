"""SAM's image encoder: sizes of the release, and the published code's numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from umm_jax.errors import ConfigError
from umm_jax.models.layers import Keys
from umm_jax.models.sam_encoder import SamEncoder, SamEncoderConfig, _cut, _joined
from umm_jax.weights import stock
from umm_jax.weights.table import Table, compare

SMALL = SamEncoderConfig(
    image_size=48, patch=8, width=32, layers=4, heads=4, mlp=40, groups=2, window=4, out=16
)


def shapes_of(config) -> dict:
    state = nnx.split(nnx.eval_shape(lambda: SamEncoder(config, rngs=Keys(0))))[1]
    return {"/".join(map(str, path)): value.shape for path, value in nnx.to_flat_state(state)}


@pytest.mark.parametrize(
    "config, count",
    [
        (SamEncoderConfig(), 637_026_048),
        (SamEncoderConfig(width=1024, layers=24, heads=16, mlp=4096), 308_278_272),
        (SamEncoderConfig(width=768, layers=12, heads=12, mlp=3072), 89_670_912),
    ],
    ids=["H", "L", "B"],
)
def test_parameters_of_the_published_sizes(config, count):
    shapes = shapes_of(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count
    table = Table(tuple(stock.sam_encoder("image_encoder.", "", config)))
    table.check(shapes)
    theirs = table.theirs(shapes)
    assert theirs["image_encoder.pos_embed"] == (1, 64, 64, config.width)
    assert theirs["image_encoder.blocks.0.attn.rel_pos_h"] == (27, config.width // config.heads)
    last = config.layers - 1
    assert theirs[f"image_encoder.blocks.{last}.attn.rel_pos_h"] == (127, config.width // config.heads)


def test_windows_come_back():
    x = jnp.arange(2 * 6 * 6 * 3.0).reshape(2, 6, 6, 3)
    assert _cut(x, 4).shape == (8, 4, 4, 3)
    np.testing.assert_array_equal(_joined(_cut(x, 4), 4, 6, 2), x)


def test_settings():
    with pytest.raises(ConfigError, match="must divide"):
        SamEncoderConfig(layers=30)


# transformers' names -> those of SAM's own code.
RENAMED = {
    r"^patch_embed\.projection": "patch_embed.proj",
    r"^layers\.": "blocks.",
    r"layer_norm(\d)": r"norm\1",
    r"^neck\.conv1": "neck.0",
    r"^neck\.norm1": "neck.1",
    r"^neck\.conv2": "neck.2",
    r"^neck\.norm2": "neck.3",
}


def original(name: str) -> str:
    for theirs, own in RENAMED.items():
        name = re.sub(theirs, own, name)
    return name


def test_the_published_codes_numbers():
    torch = pytest.importorskip("torch", reason="the published code is PyTorch's")
    transformers = pytest.importorskip("transformers")
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    torch.manual_seed(0)
    c = SMALL
    published = SamVisionEncoder(
        transformers.SamVisionConfig(
            hidden_size=c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            image_size=c.image_size,
            patch_size=c.patch,
            output_channels=c.out,
            mlp_dim=c.mlp,
            window_size=c.window,
            global_attn_indexes=[1, 3],
            num_pos_feats=8,
        )  # fmt: skip
    ).eval()
    for value in published.parameters():
        torch.nn.init.normal_(value, std=0.2)
    tensors = {original(name): value.numpy() for name, value in published.state_dict().items()}
    table, shapes = Table(tuple(stock.sam_encoder("", "", c))), shapes_of(c)
    assert compare(table, shapes, {name: value.shape for name, value in tensors.items()}) == []
    model = SamEncoder(c, rngs=Keys(0))
    filled = table.fill(shapes, tensors.__getitem__)
    for path, value in nnx.to_flat_state(nnx.state(model)):
        value[...] = jnp.asarray(filled["/".join(map(str, path))])
    pixels = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = published(torch.tensor(pixels.transpose(0, 3, 1, 2)))
    wanted = getattr(wanted, "last_hidden_state", wanted)
    found = jax.jit(lambda x: model(x))(pixels)
    np.testing.assert_allclose(found, np.asarray(wanted).transpose(0, 2, 3, 1), atol=3e-4, rtol=1e-3)
