"""Models of other libraries as experts: small ones of random weights, made here, and what is missing."""

import numpy as np
import pytest

from umm_jax.errors import ConfigError
from umm_jax.router.conformance import failures, request
from umm_jax.router.experts import ExpertError, Registry

torch = pytest.importorskip("torch", reason="these experts are PyTorch's")
transformers = pytest.importorskip("transformers")


def tokenizer(folder):
    """Letters, as CLIP's tokenizer has them."""
    import json

    letters = [chr(c) for c in range(97, 123)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / name) for name in ("vocab.json", "merges.txt"))
    return transformers.CLIPTokenizer(*files, model_max_length=77)


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    """A folder with a small InstructPix2Pix."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("editor")
    torch.manual_seed(0)
    text = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, in_channels=8, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    made = diffusers.StableDiffusionInstructPix2PixPipeline(
        vae, transformers.CLIPTextModel(text), tokenizer(folder), unet, diffusers.EulerDiscreteScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.save_pretrained(str(folder / "model"))
    return folder / "model"


def test_a_pipeline_of_diffusers_edits(editor):
    from umm_jax.router.adapters import Diffusers

    expert = Diffusers(str(editor), num_inference_steps=2)
    assert expert.spec.tasks == {"image_edit"} and "InstructPix2Pix" in expert.spec.version
    assert failures(expert) == []
    asked = request("image_edit")
    first, other = (expert.run(request("image_edit", seed=s)).media[0].value for s in (1, 2))
    assert (first != other).any() and first.shape == asked.medium.value.shape
    np.testing.assert_array_equal(first[~asked.region], asked.medium.value[~asked.region])


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    """A folder with a small SAM."""
    folder = tmp_path_factory.mktemp("sam")
    torch.manual_seed(0)
    config = transformers.SamConfig(
        vision_config=transformers.SamVisionConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
            output_channels=32, mlp_dim=32, num_pos_feats=16, window_size=2, global_attn_indexes=[0],
        ),
        prompt_encoder_config=transformers.SamPromptEncoderConfig(
            hidden_size=32, image_size=64, patch_size=16,
        ),
        mask_decoder_config=transformers.SamMaskDecoderConfig(
            hidden_size=32, mlp_dim=32, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=32,
        ),
    )  # fmt: skip
    transformers.SamModel(config).save_pretrained(str(folder))
    sizes = dict(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    sizes |= dict(mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16})
    transformers.SamProcessor(transformers.SamImageProcessor(**sizes)).save_pretrained(str(folder))
    return folder


def test_sam_segments_what_lies_in_a_box(sam):
    from umm_jax.router.adapters import Sam

    expert = Sam(str(sam))
    assert expert.spec.needs_box == {"image_seg"} and expert.spec.version.startswith("sam ")
    assert failures(expert) == []
    with pytest.raises(ExpertError, match="needs a box"):
        expert.run(request("image_seg", boxed=False))


def test_what_is_missing_is_told(monkeypatch, tmp_path):
    from umm_jax.router import adapters

    for name in ("UMM_DIFFUSERS_MODEL", "UMM_SAM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    registry = Registry.installed()
    with pytest.raises(ConfigError, match="set UMM_DIFFUSERS_MODEL to a pipeline"):
        registry.get("adapters.diffusers")
    with pytest.raises(ConfigError, match="set UMM_SAM_MODEL"):
        registry.get("adapters.sam")
    assert [e.spec.name for e in registry.chain("image_seg")] == ["classical.segment"], "the others go on"
    with pytest.raises(ConfigError, match="nowhere"):
        adapters.Sam(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="neither SAM nor SAM 2"):
        adapters.Sam(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'umm_jax\[torch\]'"):
        adapters._model("X", "y", "diffusers", None)
