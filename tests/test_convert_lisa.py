"""A folder laid out as LISA's checkpoints are, both ways: its names, sharded, with what nobody reads."""

import json

import numpy as np
import pytest
import unified_toy as toy
from flax import nnx
from safetensors.numpy import load_file, save_file

from umm_jax import cli, families
from umm_jax.config import load
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.models.backbone import BackboneConfig
from umm_jax.models.layers import Keys
from umm_jax.models.sam_encoder import SamEncoderConfig
from umm_jax.models.tower import TowerConfig
from umm_jax.models.vision import ClipConfig, ClipTowerConfig

FAMILY = families.get("unified_mllm")
WEIGHTS, CONFIG = FAMILY.weights, FAMILY.config
TOLD = dict(
    model_type="llava",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    rms_norm_eps=1e-5,
    mm_vision_tower="somebody/clip-small",
    mm_vision_select_layer=-2,
)


def model():
    encoder = SamEncoderConfig(
        image_size=64, patch=16, width=64, layers=2, heads=1, mlp=96, groups=1, window=3
    )
    clip = ClipConfig(image_size=28, patch=14, width=64, layers=3, heads=1, mlp=96)
    return CONFIG.ModelConfig(
        layout=FAMILY.stream.LayoutConfig(image_size=28, image_tokens=4, large_size=64, dialect="lisa"),
        backbone=BackboneConfig(vocab=300, width=32, layers=2, heads=4, mlp=48, norm_eps=1e-5),
        tower=TowerConfig(kind="clip", clip=ClipTowerConfig(clip, -2)),
        adapter=(32,),
        masks=CONFIG.MaskConfig(encoder=encoder),
    )


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Random tensors under LISA's names, in two shards."""
    folder, draw = tmp_path_factory.mktemp("lisa"), np.random.default_rng(0)
    state = nnx.split(nnx.eval_shape(lambda: FAMILY.model.build(model(), Keys(0))))[1]
    ours = {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(state)}
    shapes = WEIGHTS.table(model()).theirs(ours)
    last = f"{WEIGHTS.TOWER}encoder.layers.1."
    unread = {name.replace(last, last.replace("1.", "2.")): s for name, s in shapes.items() if last in name}
    unread |= {f"{WEIGHTS.TOWER}post_layernorm.{n}": (64,) for n in ("weight", "bias")}
    unread["model.layers.0.self_attn.rotary_emb.inv_freq"] = (4,)
    tensors = {name: draw.normal(size=s).astype(np.float16) for name, s in {**shapes, **unread}.items()}
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    places = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: a for name, a in tensors.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(TOLD))
    return folder, tensors, set(shapes)


def everything(folder):
    return {name: a for file in folder.glob("*.safetensors") for name, a in load_file(file).items()}


def test_there_and_back_gives_the_same_bits(released, tmp_path, capsys):
    folder, tensors, read = released
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["convert", "from-torch", str(folder), f"--out={run}", "--family=unified_mllm"]) == 0
    found = load(run / "config.json")
    assert found.family == "unified_mllm"
    assert toy.from_dict(CONFIG.ModelConfig, found.model, "model") == model()
    assert cli.main(["convert", "to-torch", f"--run={run}", f"--out={out}"]) == 0
    assert f"{len(read)} of {len(read)} are bit for bit what they came as" in capsys.readouterr().out
    back = everything(out)
    assert set(back) == read
    for name in read:
        assert back[name].dtype == tensors[name].dtype and back[name].tobytes() == tensors[name].tobytes(), (
            name
        )
    # An export says itself what it is.
    assert cli.main(["convert", "from-torch", str(out), f"--out={tmp_path / 'again'}"]) == 0


def test_it_is_known_by_its_config_and_its_pieces_follow(released, tmp_path, capsys):
    folder, *_ = released
    marks = ["[SEG]", "<im_start>", "<im_end>"]
    words = ["the quick brown fox jumps over a lazy dog"]
    size = Tokenizer.train(words, folder / "tokenizer.model", vocab=290, whole_words=False).size
    (folder / "added_tokens.json").write_text(json.dumps({m: size + k for k, m in enumerate(marks)}))
    run = tmp_path / "run"
    assert cli.main(["convert", "from-torch", str(folder), f"--out={run}"]) == 0
    assert load(run / "config.json").family == "unified_mllm"
    pieces = Tokenizer.load(run / "tokenizer.model")
    assert [pieces.id(mark) for mark in marks] == [size, size + 1, size + 2]
    assert size not in pieces.encode("the [SEG] fox")  # no text reaches them
    (folder / "added_tokens.json").write_text(json.dumps({"[SEG]": size + 1}))
    assert cli.main(["convert", "from-torch", str(folder), f"--out={tmp_path / 'no'}"]) == 2
    assert "do not follow" in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_what_is_missing_is_named_and_nothing_is_written(released, tmp_path, capsys):
    folder, tensors, _ = released
    short = tmp_path / "short"
    short.mkdir()
    gone = f"{WEIGHTS.SAM}mask_decoder.iou_token.weight"
    save_file({n: a for n, a in tensors.items() if n != "lm_head.weight"}, short / "model.safetensors")
    (short / "config.json").write_text(json.dumps(TOLD))
    run = tmp_path / "run"
    assert cli.main(["convert", "from-torch", str(short), f"--out={run}", "--family=unified_mllm"]) == 4
    assert "lm_head.weight" in capsys.readouterr().err and not run.exists()
    # Without the head of masks it would be a LLaVA; what is left of the head is not passed over.
    save_file({n: a for n, a in tensors.items() if n != gone}, short / "model.safetensors")
    assert cli.main(["convert", "from-torch", str(short), f"--out={run}", "--family=unified_mllm"]) == 4
    assert WEIGHTS.SAM in capsys.readouterr().err and not run.exists()
