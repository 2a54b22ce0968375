"""The reference's tensors, all of them, and what `umm convert verify` says where something is wrong."""

import json
import shutil

import numpy as np
import parity
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from umm_jax import cli
from umm_jax.convert import verify
from umm_jax.convert.fixtures import chatumm as bagel
from umm_jax.convert.fixtures import mm_interleaved as fixtures
from umm_jax.families.mm_interleaved import weights
from umm_jax.families.mm_interleaved.model import build
from umm_jax.families.mm_interleaved.reference import reference_config
from umm_jax.models.layers import Keys

needs_reference = pytest.mark.skipif(
    not (parity.FOLDER / "config.json").exists(),
    reason=f"reference tensors not found at {parity.FOLDER}; set UMM_PARITY_DIR to run this comparison",
)
# The gradient of everything is a program that takes minutes to compile.
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n == "h_grads" else n for n in fixtures.CHECKS]


@pytest.fixture(scope="module")
def reference():
    return fixtures.Reference(parity.FOLDER, json.loads((parity.FOLDER / "config.json").read_text()))


@needs_reference
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_reference(reference, name):
    rows = list(fixtures.CHECKS[name](reference, reference.tensors(name)))
    assert rows
    missed = [verify.line(row) for row in rows if not row.passed]
    assert not missed, "\n".join(missed)


@pytest.fixture
def folder(tmp_path):
    """A small fixture folder that can be changed: the deformable core and the resamplers."""
    for name in ("config.json", "manifest.json", "model.safetensors", "c_perceiver.safetensors"):
        shutil.copy(parity.FOLDER / name, tmp_path / name)
        (tmp_path / name).chmod(0o644)
    return tmp_path


def changed(folder, name, change):
    path = folder / name
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@needs_reference
def test_a_miss_is_shown_written_and_ends_with_status_1(folder, capsys):
    def nudge(tensors):
        tensors["vis_output"][0, 0, 0] += 1.0

    changed(folder, "c_perceiver.safetensors", nudge)
    out = folder / "rows.json"
    assert cli.main(["convert", "verify", str(folder), "--json", str(out)]) == 1
    told = capsys.readouterr()
    assert "MISS" in told.out and "dec_output" in told.out
    assert "1 of 2 rows pass; missed: c_perceiver/vis_output" in told.err
    rows = {row["tensor"]: row for row in json.loads(out.read_text())}
    assert rows["dec_output"]["passed"] and not rows["vis_output"]["passed"]
    assert 0.9 < rows["vis_output"]["error"] < 1.1 and rows["vis_output"]["tolerance"] == 1e-4


@needs_reference
def test_what_does_not_fit_is_named_before_anything_is_compared(folder, capsys):
    changed(folder, "model.safetensors", lambda tensors: tensors.pop("soi_token"))
    assert cli.main(["convert", "verify", str(folder)]) == 4
    assert "soi_token is missing (expected [1, 64])" in capsys.readouterr().err

    whole = (folder / "c_perceiver.safetensors").read_bytes()
    shutil.copy(parity.FOLDER / "model.safetensors", folder / "model.safetensors")
    (folder / "c_perceiver.safetensors").write_bytes(whole[:-100])
    assert cli.main(["convert", "verify", str(folder)]) == 4
    assert "c_perceiver.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", bagel.CHECKS)
def test_every_tensor_of_bagel(name):
    folder = parity.FOLDER.parent / "bagel"
    if not (folder / "fixture.json").exists():
        pytest.skip(f"reference tensors not found at {folder}; set UMM_PARITY_DIR to run this comparison")
    rows = list(verify.checks(folder, [name]))
    assert rows
    missed = [verify.line(row) for row in rows if not row.passed]
    assert not missed, "\n".join(missed)


def test_a_bagel_of_other_dimensions_in_pytorch_agrees(tmp_path):
    pytest.importorskip(
        "torch", reason="torch is not installed: no second reference for BAGEL's forward pass"
    )
    import bagel_reference

    bagel_reference.write(tmp_path)
    rows = list(verify.checks(tmp_path))
    files = {row.file for row in rows}
    assert {"train_forward", "grads", "mot_layer", "sampling"} <= files and len(rows) > 220
    missed = [verify.line(row) for row in rows if not row.passed]
    assert not missed, "\n".join(missed)


def test_a_folder_that_is_none_of_ours(tmp_path, capsys):
    assert cli.main(["convert", "verify", str(tmp_path)]) == 4
    assert "no config.json or fixture.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert cli.main(["convert", "verify", str(tmp_path)]) == 4
    assert "no layout known here (chatumm, mm_interleaved)" in capsys.readouterr().err


def test_rows_measure_error_against_the_tensor_and_never_pass_a_nan():
    theirs = np.array([100.0, -1.0])
    assert verify.compared("f", "t", theirs + [0.009, 0.0], theirs).passed
    assert not verify.compared("f", "t", theirs + [0.011, 0.0], theirs).passed
    assert not verify.compared("f", "t", np.array([np.nan, -1.0]), theirs).passed
    assert verify.compared("f", "t", np.array([100.0, np.nan]), theirs, where=[True, False]).passed
    assert verify.compared("f", "t", np.zeros(2), np.zeros(2)).passed
    assert not verify.compared("f", "t", np.array([1e-9, 0]), np.zeros(2)).passed
    assert verify.equal("f", "t", [1, 2], [1, 2]).passed
    assert verify.equal("f", "t", [1, 3], [1, 2]).error == 1
    assert not verify.equal("f", "t", [1], [1, 2]).passed


# --- a folder of other dimensions -------------------------------------------------------------------

PAD, SOI, IMAGE = 99, 100, 101
SLOTS, LATENT = [IMAGE] * 5, 32


def other_config() -> dict:
    """Nothing as in the recorded set: sizes, heads, levels, points, images a row, a short last group."""
    perceiver = dict(num_queries=5, hidden_size=24, encoder_hidden_size=24, cross_attention_frequency=1)
    perceiver |= dict(num_hidden_layers=3, num_attention_heads=2, qk_normalization=True, intermediate_size=30)
    context = dict(num_queries=6, hidden_size=20, encoder_hidden_size=48, cross_attention_frequency=1)
    context |= dict(num_hidden_layers=1, num_attention_heads=2, intermediate_size=30)
    llm = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=5, num_attention_heads=3)
    clip = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=3)
    unet = dict(block_out_channels=[8, 16, 24], attention_head_dim=[1, 2, 3], cross_attention_dim=20)
    vae = dict(block_out_channels=[4, 8], norm_num_groups=2, layers_per_block=1, latent_channels=3)
    schedule = dict(beta_start=0.001, beta_end=0.02, beta_schedule="linear", num_train_timesteps=500)
    fixed = dict(uncond_prob=0.1, llm_mmfs_base_spatial_shape=12, unet_mmfs_spatial_shapes=[64, 32, 16, 8])
    fixed |= dict(unet_mmfs_pos_embed_grid=32, visual_pos_embed_grid=16, adapter_n_points=2)
    fixed |= dict(adapter_layernorm_eps=1e-5, qformer_layer_norm_eps=1e-12, perceiver_dropout=0.0)
    return {
        "config": {
            "llm": llm | dict(rms_norm_eps=1e-5),
            "clip": clip | dict(image_size=84, patch_size=14, layer_norm_eps=1e-5),
            "unet": unet | dict(norm_num_groups=4, layers_per_block=1),
            "vae": vae,
            "image_size_dec": 2 * LATENT,
            "seq_len": 64,
            "num_img_token": len(SLOTS),
            "cross_attention_frequency": 3,
            "spatial_shapes": [12, 6],
            "vt_perceiver": perceiver,
            "dec_perceiver": context,
        },
        "unet_topology": {"down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"]},
        "noise_scheduler": schedule | dict(prediction_type="epsilon", steps_offset=1),
        "fixed_constants": fixed | {"special_tokens": dict(bos=1, eos=2, pad=PAD, soi=SOI, image=IMAGE)},
    }


def other_state(found: dict, rng) -> dict:
    """A random state dict for it. Heads and points of the synchronizers are told by shapes alone."""
    vision, decoder = "visual_tokenizer.encoder.vision_model.adapter_", "image_decoder.decoder.mmfs_module."
    told = {
        "mm_decoder.embed_tokens.weight": (102, 48),
        "text_decoder.head_new.weight": (2, 48),
        f"{vision}spm.stem.0.weight": (6, 3, 3, 3),
        f"{vision}interactions.3.extra_extractors.0.gamma": (),
        f"{vision}interactions.0.extractor.attn.attention_weights.weight": (3 * 2, 24),
        f"{vision}interactions.0.extractor.attn.value_proj.weight": (12, 24),
        f"{vision}interactions.0.extractor.ffn.fc1.weight": (6, 24),
    }
    places = (("mm_decoder.layers.0.llama_cross_attn.attn.", 2, 24, 48, 9),)
    places += ((f"{decoder}mmfs_mid_block.mmfs.", 4, 16, 24, 5),)
    for prefix, levels, values, width, most in places:
        told |= {
            f"{prefix}sampling_offsets.weight": (2 * 3 * 2, width),
            f"{prefix}attention_weights.weight": (2 * levels * (3 + 1), width),
            f"{prefix}value_proj.weight": (values, 24),
            f"{prefix}query_relpos.weight": (most, width),
        }
    config = reference_config(found, told)
    table = weights.table(config)
    state = nnx.split(nnx.eval_shape(lambda: build(config, Keys(0))))[1]
    ours = {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}
    table.check(ours)
    made = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in table.theirs(ours).items()}
    return made | {c.theirs: np.ascontiguousarray(c.value()) for c in table.constants}


def other_tensors(config, rng) -> dict[str, dict]:
    """Inputs at random, outputs of the right shapes and zero: every comparison runs, and misses."""

    def draw(*shape):
        return rng.normal(0, 1, shape).astype(np.float32)

    def zeros(*shape):
        return np.zeros(shape, np.float32)

    sides, cells = (24, 12, 6, 3), 12 * 12 + 6 * 6
    text = [[1, 5, SOI, *SLOTS, 7, 2, 1, 9, SOI, *SLOTS, 8, 2], [1, 6, 7, 2] + [PAD] * 16]
    rows = dict(text_ids=np.array(text), num_image_per_seq=np.array([2, 0]))
    rows |= dict(attention_mask=(np.array(text) != PAD).astype(np.int64))
    images = dict(image_tensors=rng.uniform(size=(2, 3, 84, 84)).astype(np.float32))
    latents = (3, LATENT, LATENT)
    t = {
        "a_ms_deform_core": dict(
            value=draw(1, 16, 2, 3),
            spatial_shapes=np.array([[4, 3], [2, 2]]),
            sampling_locations=draw(1, 5, 2, 2, 3, 2),
            attention_weights=draw(1, 5, 2, 2, 3),
            output=zeros(1, 5, 6),
            grad_output=draw(1, 5, 6),
            grad_value=zeros(1, 16, 2, 3),
            grad_sampling_locations=zeros(1, 5, 2, 2, 3, 2),
            grad_attention_weights=zeros(1, 5, 2, 2, 3),
        ),
        "b1_llm_mmfs_layer": dict(
            hidden_states=draw(2, 4, 48),
            vision_hidden_states=draw(2, 2, cells, 24),
            cross_attention_mask=rng.integers(0, 2, (2, 4, 2)).astype(np.float32),
            hidden_states_decode=draw(2, 1, 48),
            output=zeros(2, 4, 48),
            core_output=zeros(2, 4, 48),
            output_decode=zeros(2, 1, 48),
        ),
        "c_perceiver": dict(
            vis_encoder_hidden_states=draw(2, 37, 24),
            vis_output=zeros(2, 5, 24),
            dec_encoder_hidden_states=draw(2, 7, 48),
            dec_encoder_attention_mask=np.array([[1] * 7, [1] * 4 + [0] * 3]),
            dec_output=zeros(2, 6, 20),
        ),
        "d_visual_tokenizer": dict(
            image=images["image_tensors"],
            spm_c1=zeros(2, 24, 24, 24),
            interaction0_x=zeros(2, 36, 24),
            interaction0_c=zeros(2, 144 + 36 + 9, 24),
            encoder_last_hidden_state=zeros(2, 37, 24),
            vis_embed=zeros(2, 5, 48),
            **{f"multiscale_{i}": zeros(2, 24, s, s) for i, s in enumerate(sides)},
        ),
        "e_llm_forward": dict(
            **rows,
            **images,
            mm_embeds=zeros(2, 20, 48),
            cross_attention_mask=zeros(2, 20, 2),
            mmfs_features_mm=zeros(2, 2, cells, 24),
            hidden_states=zeros(6, 2, 20, 48),
            logits=zeros(2, 20, 102),
        ),
        "f_unet_vae": dict(
            sample=draw(2, *latents),
            timesteps=np.array([3, 400]),
            encoder_hidden_states=draw(2, 6, 20),
            mmfs_mask=np.array([[1], [0]]),
            **{f"mmfs_feat_{i}": draw(2, 1, 24, s, s) for i, s in enumerate(sides)},
            noise_pred=zeros(2, *latents),
            noise_pred_no_mmfs=zeros(2, *latents),
            vae_input=draw(1, 3, 2 * LATENT, 2 * LATENT),
            vae_moments=zeros(1, 6, LATENT, LATENT),
            vae_latent=draw(1, *latents),
            vae_decoded=zeros(1, 3, 2 * LATENT, 2 * LATENT),
        ),
        "g_train_forward": dict(
            **rows,
            **images,
            image_tensors_dec=rng.uniform(size=(2, 3, 2 * LATENT, 2 * LATENT)).astype(np.float32),
            uncond_rand=np.array([0.05, 0.5], np.float32),
            vae_eps=draw(2, *latents),
            diffusion_noise=draw(2, *latents),
            timesteps=np.array([7, 300]),
            gt_text_ids=np.zeros((2, 19), np.int64),
            gt_text_ids_laion=np.zeros((2, 19), np.int64),
            vae_moments=zeros(2, 6, LATENT, LATENT),
            noisy_latents=zeros(2, *latents),
            context_attention_mask=np.array([[1, 1, 1], [1, 1, 1]]),
            context_features=zeros(2, 3, 48),
            unet_encoder_hidden_states=zeros(2, 6, 20),
            unet_mmfs_mask=np.zeros((2, 1), np.int64),
            unet_pred=zeros(2, *latents),
            **{name: zeros() for name in ("loss_txt", "loss_txt_laion", "loss_img", "loss")},
        ),
        "i_generate_text": dict(
            text_ids=np.array([[PAD] * 2 + [1, 5, SOI, *SLOTS, 7], [1, 4, 8, 3, 6, SOI, *SLOTS]]),
            attention_mask=np.array([[0] * 2 + [1] * 9, [1] * 11]),
            num_image_per_seq=np.array([1, 1]),
            **images,
            greedy_ids=np.zeros((2, 5), np.int64),
            greedy_step_logits=zeros(2, 4, 102),
            beam2_ids=np.zeros((2, 4), np.int64),
        ),
        "j_sample_image": dict(
            **rows,
            **images,
            target_image_idxs=np.array([1]),
            init_latents=draw(1, *latents),
            step_noise=draw(3, 1, *latents),
            timesteps=np.zeros(3, np.int64),
            unet_pred=draw(3, 2, *latents),
            image=zeros(1, 3, 2 * LATENT, 2 * LATENT),
        ),
    }
    skips, mid = config.unet.skip_shapes(), config.unet.mid_shape()
    places = {f"skip_{i}": (w, s, s) for i, (s, w) in enumerate(skips)} | {"mid": (mid[1], mid[0], mid[0])}
    t["b2_unet_mmfs_net"] = {f"feat_{s}": draw(2, 1, 24, s, s) for s in sides}
    t["b2_unet_mmfs_net"] |= dict(mask=np.array([[1], [0]]))
    for name, shape in places.items():
        t["b2_unet_mmfs_net"] |= {f"{name}_in": draw(2, *shape), f"{name}_out": zeros(2, *shape)}
    return t


@pytest.mark.slow
def test_no_dimension_is_taken_for_granted(tmp_path):
    rng, found = np.random.default_rng(0), other_config()
    (tmp_path / "config.json").write_text(json.dumps(found))
    save_file(other_state(found, rng), tmp_path / "model.safetensors")
    reference = fixtures.Reference(tmp_path, found)
    config = reference.config
    assert (config.backbone.synchronizer.heads, config.backbone.synchronizer.points) == (2, 3)
    assert (config.unet_sync.heads, config.backbone.syncs, config.most_images) == (2, 2, 8)
    tensors = other_tensors(config, rng)
    for name, own in tensors.items():
        save_file(own, tmp_path / f"{name}.safetensors")
    rows: dict[str, list] = {}
    for row in verify.checks(tmp_path):
        rows.setdefault(row.file, []).append(row)
        assert np.isfinite(row.error), verify.line(row)
    assert set(rows) == set(tensors)
    assert len(rows["b2_unet_mmfs_net"]) == 7 and len(rows["e_llm_forward"]) == 10
    # Nothing but the grid of times could agree with zeros, and the reference's is of another schedule.
    assert not any(row.passed for name in rows for row in rows[name] if row.tolerance)
