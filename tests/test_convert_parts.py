"""Stock parts: what we export gives our outputs in the stock classes, what they save begins a run of ours."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import mm_interleaved_toy
import numpy as np
import pytest
import release_toy as toy
from flax import nnx
from parity import load

from umm_jax import cli, sharding
from umm_jax import config as configs
from umm_jax.convert.from_parts import from_parts
from umm_jax.convert.from_torch import from_torch
from umm_jax.convert.to_torch import to_torch
from umm_jax.errors import CheckpointError, ConfigError
from umm_jax.models.autoencoder import make_autoencoder
from umm_jax.models.backbone import Backbone
from umm_jax.models.unet import UNet
from umm_jax.models.vision import Clip
from umm_jax.train.checkpoint import Checkpoints
from umm_jax.train.optimizer import unflatten
from umm_jax.train.parts import PartReader
from umm_jax.train.state import abstract_params

torch = pytest.importorskip("torch", reason="stock classes need torch")
transformers = pytest.importorskip("transformers", reason="stock classes of Llama and CLIP")
diffusers = pytest.importorskip("diffusers", reason="stock classes of Stable Diffusion")

RUN = configs.RunConfig(family="mm_interleaved", model=toy.section())


shapes_once = pytest.fixture(scope="module", autouse=True)(toy.shapes_once)


def quiet(_):
    pass


@pytest.fixture(scope="module")
def layout():
    return toy.layout()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, layout):
    """(run folder of random float32 weights, folder with all its parts)."""
    base = tmp_path_factory.mktemp("parts")
    toy.save(toy.state(layout), base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"family": "mm_interleaved", "model": toy.section()}))
    from_torch(base / "model.safetensors", base / "run", say=quiet)
    to_torch(base / "run", base / "out", part="all", say=quiet)
    return base / "run", base / "out"


def ours(run: Path, prefix: str, leave: str = "-") -> dict:
    """Parameters of one module of a run, as its nested dict."""
    reader = PartReader(run / "checkpoints")
    chosen = [p for p in reader.arrays if p.startswith(prefix) and not p.startswith(leave)]
    return unflatten({path.removeprefix(prefix): reader.read(path) for path in chosen})


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a), b.detach().numpy()
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())
    assert np.abs(b).max() > 1e-2  # there is something to compare


def rng(seed=0):
    return np.random.default_rng(seed)


# --- out --------------------------------------------------------------------------------------------


def test_llama_gives_our_hidden_states(exported, layout):
    run, out = exported
    theirs, report = transformers.LlamaModel.from_pretrained(out / "llm", output_loading_info=True)
    assert not any(report.values())
    config = replace(layout.model.backbone, synchronizer=None)
    module = load(lambda: Backbone(config, nnx.Rngs(0)), ours(run, "backbone/", "backbone/syncs/"))
    ids = rng().integers(0, toy.VOCAB, (2, 7))
    x = ours(run, "embed/")["table"][ids]
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((7, 7), bool)), (2, 7, 7))
    hidden, _ = jax.jit(module)(jnp.asarray(x), positions, causal)
    close(hidden, theirs.eval()(torch.from_numpy(ids)).last_hidden_state)


def test_clip_gives_our_tokens(exported, layout):
    run, out = exported
    theirs, report = transformers.CLIPVisionModel.from_pretrained(out / "clip", output_loading_info=True)
    assert not any(report.values())
    module = load(
        lambda: Clip(layout.model.tower.clip_adapter.clip, rngs=nnx.Rngs(0)), ours(run, "tower/clip/")
    )
    pixels = rng().normal(size=(2, 28, 28, 3)).astype(np.float32)
    tokens = jax.jit(lambda p: module.run(module.layers, module.embed(p)))(pixels)
    close(tokens, theirs.eval()(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).last_hidden_state)


def test_the_unet_gives_our_prediction(exported, layout):
    run, out = exported
    theirs, report = diffusers.UNet2DConditionModel.from_pretrained(out / "unet", output_loading_info=True)
    assert not any(report.values())
    module = load(lambda: UNet(layout.model.unet, rngs=nnx.Rngs(0)), ours(run, "unet/"))
    x = rng().normal(size=(2, 4, 4, 4)).astype(np.float32)
    context = rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    t = np.array([3, 801])
    given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t), torch.from_numpy(context)
    found = theirs.eval()(*given).sample.permute(0, 2, 3, 1)
    close(jax.jit(lambda *given: module(*given, None, None))(x, t, context), found)


def test_the_autoencoder_gives_our_latents_and_pixels(exported, layout):
    run, out = exported
    theirs, report = diffusers.AutoencoderKL.from_pretrained(out / "vae", output_loading_info=True)
    assert not any(report.values())
    theirs = theirs.eval()
    module = load(
        lambda: make_autoencoder(layout.model.autoencoder, rngs=nnx.Rngs(0)), ours(run, "autoencoder/")
    )
    pixels = rng().uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    posterior = theirs.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).latent_dist
    scale = theirs.config.scaling_factor
    assert scale == layout.model.autoencoder.latent_scale
    latents = jax.jit(lambda p: module.encode(p, None))(pixels)
    close(latents, posterior.mode().permute(0, 2, 3, 1) * scale)
    back = theirs.decode(torch.from_numpy(np.asarray(latents).transpose(0, 3, 1, 2).copy()) / scale).sample
    close(jax.jit(module.decode)(latents), back.permute(0, 2, 3, 1))


def test_parts_say_what_they_are_and_what_was_checked(exported):
    _, out = exported
    assert sorted(p.name for p in out.iterdir()) == ["clip", "llm", "unet", "vae"]
    for name, word in {
        "llm": "no `lm_head`",
        "clip": "post_layernorm",
        "unet": "skips",
        "vae": "0.18215",
    }.items():
        assert word in (out / name / "README.md").read_text()
        checks = json.loads((out / name / "parity.json").read_text())["checks"]
        assert checks[1]["compared"] == checks[1]["equal"] > 20 and (out / name / "sha256sums").exists()


@pytest.mark.parametrize("part", ["llm", "clip", "unet", "vae"])
def test_a_model_of_another_kind_has_no_such_part(part):
    with pytest.raises(ConfigError, match="config.model"):
        toy.FAMILY.weights.stock_part(part, mm_interleaved_toy.model_config())


# --- in ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Folders that the libraries wrote, of tiny random models, with the names of their own classes."""
    base = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=toy.SOI,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        rms_norm_eps=1e-6,
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(base / "llama")
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = dict(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=30,
        max_position_embeddings=3,
        bos_token_id=0,
        eos_token_id=1,
    )
    both = transformers.CLIPConfig(text_config=text, vision_config=vision)
    transformers.CLIPModel(both).half().save_pretrained(base / "clip")
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)).save_pretrained(base / "text")
    (base / "words").mkdir()
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}
    (base / "words" / "vocab.json").write_text(json.dumps(vocab))
    (base / "words" / "merges.txt").write_text("#version: 0.2\n")
    diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(4, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(1, 2),
        cross_attention_dim=8,
        norm_num_groups=2,
        use_linear_projection=True,
    ).save_pretrained(base / "unet", safe_serialization=False)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    )
    vae.save_pretrained(base / "vae")
    return base


def loaded(out: Path) -> dict[str, np.ndarray]:
    reader = PartReader(out / "checkpoints")
    return {path: reader.read(path) for path in reader.arrays}


def test_a_pre_training_begins_from_stock_parts(tmp_path, stock, layout):
    said = []
    parts = {"llm": stock / "llama", "clip": stock / "clip", "unet": stock / "unet", "vae": stock / "vae"}
    with pytest.raises(ConfigError, match="--allow-pickle"):
        from_parts(RUN, tmp_path / "run", parts)
    from_parts(
        RUN,
        tmp_path / "run",
        parts,
        text_encoder=stock / "text",
        text_tokenizer=stock / "words",
        allow_pickle=True,
        say=said.append,
    )
    found = loaded(tmp_path / "run")
    llama = transformers.LlamaForCausalLM.from_pretrained(stock / "llama").state_dict()
    n = toy.SOI
    assert np.array_equal(found["embed/table"][:n], llama["model.embed_tokens.weight"].numpy())
    rows = found["embed/table"][n:]
    assert rows.shape == (2, 16) and 0.005 < rows.std() < 0.05
    assert np.array_equal(found["head/base/kernel"][:, :n], llama["lm_head.weight"].numpy().T)
    assert not found["head/base/kernel"][:, n:].any()
    assert np.array_equal(found["head/base/bias"], [0.0] * n + [-100.0] * 2)
    assert "head/added/bias" not in found
    down = llama["model.layers.2.mlp.down_proj.weight"].numpy()
    assert np.array_equal(found["backbone/layers/mlp/down/kernel"][2], down.T)
    assert found["tower/clip/layers/up/kernel"].dtype == np.float16
    assert found["null_condition"].shape == (3, 8) and found["null_condition"].any()
    unet = diffusers.UNet2DConditionModel.from_pretrained(stock / "unet", use_safetensors=False).state_dict()
    assert np.array_equal(found["unet/conv_in/kernel"], unet["conv_in.weight"].numpy().transpose(2, 3, 1, 0))

    # What init_from does: it takes exactly these, and the seed gives the rest.
    mesh = sharding.make_mesh(configs.MeshConfig(1, 1, 1), jax.devices()[:1])
    _, _, abstract = abstract_params(lambda rngs: toy.FAMILY.model.build(layout.model, rngs), mesh)
    taken = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).restore_matching(abstract)
    assert set(taken) == set(found) < set(layout.ours)
    assert configs.load(tmp_path / "run" / "config.json").family == "mm_interleaved"
    text = "\n".join(said)
    assert f"of {len(layout.ours)} arrays" in text and "head/added (2)" in text and "backbone/syncs" in text
    assert "head/base/bias[300:302] made here: the added tokens are silent" in text


def test_what_we_export_we_read(tmp_path, exported):
    run, out = exported
    from_parts(
        RUN, tmp_path / "run", {name: out / name for name in ("llm", "clip", "unet", "vae")}, say=quiet
    )
    found, before = loaded(tmp_path / "run"), loaded(run)
    assert len(found) > 300 and all(np.array_equal(a, before[path]) for path, a in found.items())
    assert not any(path.startswith("head/") for path in found)  # no lm_head was exported


def test_old_names_and_convolutions_of_the_autoencoder(tmp_path, stock):
    from safetensors.numpy import load_file

    state = load_file(stock / "vae" / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, a in state.items():
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                name = name.replace(new, before)
                a = a[:, :, None, None] if a.ndim == 2 else a
        renamed[name] = a
    assert renamed.keys() != state.keys()
    (tmp_path / "vae").mkdir()
    toy.save(renamed, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    for name, folder in {"old": tmp_path / "vae", "new": stock / "vae"}.items():
        from_parts(RUN, tmp_path / name, {"vae": folder}, say=quiet)
    a, b = loaded(tmp_path / "old"), loaded(tmp_path / "new")
    assert a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


def test_parts_that_do_not_fit(tmp_path, stock):
    def change(**values):
        section = toy.section()
        for where, value in values.items():
            node, *keys = section, *where.split("__")
            for key in keys[:-1]:
                node = node[key]
            node[keys[-1]] = value
        return configs.RunConfig(family="mm_interleaved", model=section)

    with pytest.raises(ConfigError, match="num_attention_heads is 2, the model has 4: the shapes would fit"):
        from_parts(change(backbone__heads=4), tmp_path / "run", {"llm": stock / "llama"}, say=quiet)
    with pytest.raises(ConfigError, match="has 300 pieces, so the vocabulary must be 300"):
        from_parts(change(backbone__vocab=310), tmp_path / "run", {"llm": stock / "llama"}, say=quiet)
    with pytest.raises(CheckpointError, match=r"mlp.gate_proj.weight is \[24, 16\], expected \[32, 16\]"):
        from_parts(change(backbone__mlp=32), tmp_path / "run", {"llm": stock / "llama"}, say=quiet)
    with pytest.raises(CheckpointError, match="is missing"):
        from_parts(RUN, tmp_path / "run", {"clip": stock / "vae"}, say=quiet)
    with pytest.raises(ConfigError, match="--tokenizer2"):
        from_parts(RUN, tmp_path / "run", {}, text_encoder=stock / "text", say=quiet)
    with pytest.raises(ConfigError, match="no part was given"):
        from_parts(RUN, tmp_path / "run", {}, say=quiet)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path, stock, capsys):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(configs.to_dict(RUN)))
    words = ["convert", "from-parts", f"--config={config}", f"--out={tmp_path / 'run'}"]
    assert cli.main([*words, f"--vae={stock / 'vae'}", "--config.train.steps=7"]) == 0
    assert "arrays, for train.init_from=" in capsys.readouterr().out
    assert configs.load(tmp_path / "run" / "config.json").train.steps == 7
    assert cli.main([*words, f"--vae={stock / 'vae'}"]) == ConfigError.exit_status
    assert "is there already" in capsys.readouterr().err
