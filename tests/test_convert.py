"""Weights from PyTorch and back: the same bits, and nothing half done whatever goes wrong."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import release_toy as toy
from parity import FOLDER
from safetensors import safe_open
from safetensors.numpy import load_file

from umm_jax import cli, sharding
from umm_jax import config as configs
from umm_jax.convert import folder as folders
from umm_jax.convert.from_torch import from_torch
from umm_jax.convert.shards import Shards, Tensor
from umm_jax.convert.source import open_source
from umm_jax.convert.to_torch import to_torch
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.errors import CheckpointError, ConfigError, StorageError
from umm_jax.train.checkpoint import Checkpoints, load_params, plain_config
from umm_jax.train.optimizer import flatten, unflatten
from umm_jax.train.parts import PartReader, chunk_shape
from umm_jax.train.state import abstract_params

ROOT = Path(__file__).resolve().parents[1]
UP = "mm_decoder.layers.1.mlp.up_proj.weight"


SHARDS = 3


shapes_once = pytest.fixture(scope="module", autouse=True)(toy.shapes_once)


def quiet(_):
    pass


def bits(a: np.ndarray) -> bytes:
    return np.ascontiguousarray(a).tobytes()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert set(a) == set(b)
    wrong = [n for n in a if a[n].dtype != b[n].dtype or a[n].shape != b[n].shape or bits(a[n]) != bits(b[n])]
    assert not wrong, wrong[:5]


def read_export(folder: Path) -> dict[str, np.ndarray]:
    """What the safetensors library reads of an export; bfloat16 by our own reader, whose numpy lacks it."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "numpy") as opened:
            found |= dict.fromkeys(opened.keys())
    source = open_source(folder)
    assert set(source.entries) == set(found)
    return {name: source.read(name) for name in found}


@pytest.fixture(scope="module")
def layout():
    return toy.layout()


@pytest.fixture(scope="module")
def mixed(layout):
    """A checkpoint as odd as they come: half precision, with some layers and tensors in other dtypes."""
    tensors = toy.state(layout, dtype=np.float16)
    for name, dtype in {
        UP: ml_dtypes.bfloat16,
        "mm_decoder.norm.weight": np.float32,
        "soi_token": np.float64,
        "visual_tokenizer.clip_mean": np.float16,
    }.items():
        tensors[name] = tensors[name].astype(dtype)
    return tensors


@pytest.fixture(scope="module")
def converted(tmp_path_factory, layout, mixed):
    """(folder of weights, run folder made of it) of the checkpoint `mixed`, in several shards."""
    base = tmp_path_factory.mktemp("convert")
    source, run = base / "weights", base / "run"
    source.mkdir()
    tensors = {name: Tensor(a.shape, a.dtype) for name, a in mixed.items()}
    with Shards(source, "model", tensors, limit=sum(t.nbytes for t in tensors.values()) * 2 // 5) as shards:
        for name, array in mixed.items():
            shards.write(name, np.ascontiguousarray(array))
    (source / "config.json").write_text(json.dumps({"family": "mm_interleaved", "model": toy.section()}))
    from_torch(source, run, say=quiet)
    return source, run


# --- there and back ---------------------------------------------------------------------------------


def test_there_and_back_gives_the_same_bits(tmp_path, converted, mixed):
    source, run = converted
    assert len(list(source.glob("*.safetensors"))) == SHARDS
    to_torch(run, tmp_path / "back", shard_size=30_000, say=quiet)
    same(read_export(tmp_path / "back"), mixed)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > SHARDS
    report = json.loads((tmp_path / "back" / "parity.json").read_text())
    assert [c["passed"] for c in report["checks"]] == [True, True]
    assert report["checks"][1]["equal"] == len(mixed)
    # And again, from what we wrote: its config.json is ours, complete.
    from_torch(tmp_path / "back", tmp_path / "again", say=quiet)
    to_torch(tmp_path / "again", tmp_path / "back2", say=quiet)
    same(read_export(tmp_path / "back2"), mixed)


def test_there_and_back_over_the_reference_state(tmp_path):
    path = FOLDER / "model.safetensors"
    if not path.exists():
        pytest.skip(f"reference tensors not found at {path}; set UMM_PARITY_DIR to run this comparison")
    from_torch(path, tmp_path / "run", say=quiet)
    to_torch(tmp_path / "run", tmp_path / "back", shard_size=2_000_000, say=quiet)
    state = load_file(path)
    found = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        found |= load_file(file)
    assert len(state) == 1737
    same(found, state)


def test_the_run_folder_is_a_run(converted, layout, mixed):
    _, run = converted
    loaded, model, params = load_params(run)
    assert model == layout.model and loaded.family == "mm_interleaved"
    flat = flatten(params)
    assert {path: a.shape for path, a in flat.items()} == layout.ours
    assert all(a.dtype == np.float32 for a in flat.values())
    up = np.asarray(flat["backbone/layers/mlp/up/kernel"])
    for i in range(4):
        theirs = mixed[f"mm_decoder.layers.{i}.mlp.up_proj.weight"]
        assert np.array_equal(up[i], theirs.astype(np.float32).T)
    assert np.array_equal(np.asarray(flat["soi_token"]), mixed["soi_token"][0].astype(np.float32))


def test_another_run_starts_from_it(converted, layout):
    _, run = converted
    mesh = sharding.make_mesh(configs.MeshConfig(1, 1, 1), jax.devices()[:1])
    build = toy.FAMILY.model.build
    _, _, abstract = abstract_params(lambda rngs: build(layout.model, rngs), mesh)
    found = Checkpoints(run / "checkpoints", read_only=True).restore_matching(abstract)
    assert set(found) == set(layout.ours)


def test_a_trained_checkpoint_is_exported_raw_and_averaged(tmp_path, layout):
    """As training saves it: one compressed store of whole arrays, averages of some parameters."""
    rng = np.random.default_rng(1)
    params = {path: rng.normal(size=shape).astype(np.float32) for path, shape in layout.ours.items()}
    ema = {path: a + 1 for path, a in params.items() if path.startswith("backbone/")}
    run = configs.RunConfig(family="mm_interleaved", model=toy.section())
    configs.save(run, tmp_path / "config.json")
    writer = Checkpoints(tmp_path / "checkpoints")
    state = jax.tree.map(jax.numpy.asarray, {"params": unflatten(params), "ema": unflatten(ema)})
    writer.save(7, state, {}, plain_config(run, layout.model))
    writer.close()

    reader = PartReader(tmp_path / "checkpoints")
    assert reader.step == 7 and reader.layers_per_chunk("backbone/layers/mlp/up/kernel") == 4
    to_torch(tmp_path, tmp_path / "raw", memory=1, say=quiet)  # a layer at a time out of chunks of four
    to_torch(tmp_path, tmp_path / "ema", weights="ema", say=quiet)
    for folder, values in {"raw": params, "ema": params | ema}.items():
        found = read_export(tmp_path / folder)
        assert {name: a.shape for name, a in found.items()} == layout.table.theirs(layout.ours)
        assert np.array_equal(found[UP], values["backbone/layers/mlp/up/kernel"][1].T)
        assert np.array_equal(found["text_decoder.head.weight"], values["head/base/kernel"].T)
        assert "compared" not in (tmp_path / folder / "parity.json").read_text()


def test_another_dtype_on_request(tmp_path, converted, mixed):
    _, run = converted
    to_torch(run, tmp_path / "out", dtype="bfloat16", say=quiet)
    found = read_export(tmp_path / "out")
    for name, a in mixed.items():
        want = a if np.issubdtype(a.dtype, np.integer) else a.astype(np.float64).astype(ml_dtypes.bfloat16)
        assert found[name].dtype == want.dtype
        assert np.allclose(found[name].astype(np.float64), want.astype(np.float64), rtol=2**-7, atol=0), name
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert not report["checks"][1]["passed"]  # they are no longer what they came as, and it says so


def test_a_value_beyond_half_precision_is_refused(tmp_path, layout):
    tensors = toy.state(layout)
    tensors["mm_decoder.norm.weight"][3] = 1e6
    source = tmp_path / "model.safetensors"
    toy.save(tensors, source)
    (tmp_path / "config.json").write_text(json.dumps({"family": "mm_interleaved", "model": toy.section()}))
    from_torch(source, tmp_path / "run", say=quiet)
    with pytest.raises(CheckpointError, match=r"mm_decoder.norm.weight: 1e\+06 is too large for float16"):
        to_torch(tmp_path / "run", tmp_path / "out", dtype="float16", say=quiet)
    assert not (tmp_path / "out").exists()


def test_what_was_verified_goes_with_the_weights(tmp_path, converted):
    _, run = converted
    (tmp_path / "verified.json").write_text('{"logits": 1e-6}')
    to_torch(run, tmp_path / "out", verified=tmp_path / "verified.json", say=quiet)
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["verified"] == {"logits": 1e-6}
    assert "were compared with the reference" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="no such file"):
        to_torch(run, tmp_path / "other", verified=tmp_path / "nothing.json", say=quiet)


def test_the_sums_are_right_and_checked(tmp_path, converted):
    _, run = converted
    to_torch(run, tmp_path / "out", say=quiet)
    lines = (tmp_path / "out" / "sha256sums").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = {p.name for p in (tmp_path / "out").iterdir()} - {"sha256sums"}
    assert set(listed) == files == {"model.safetensors", "config.json", "README.md", "parity.json"}
    assert all(folders.sha256_of(tmp_path / "out" / name) == digest for name, digest in listed.items())
    shard = tmp_path / "out" / "model.safetensors"
    with open(shard, "r+b") as file:
        file.seek(open_source(shard).entries[UP].offset)
        file.write(b"?")
    with pytest.raises(CheckpointError, match=r"model.safetensors: its sha256 is .* half downloaded"):
        from_torch(tmp_path / "out", tmp_path / "again", say=quiet)
    assert not (tmp_path / "again").exists()
    from_torch(tmp_path / "out", tmp_path / "again", checksums=False, say=quiet)


# --- what does not fit ------------------------------------------------------------------------------


def refused(tmp_path: Path, tensors: dict[str, np.ndarray], match: str) -> None:
    source = tmp_path / "weights"
    source.mkdir()
    toy.save(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"family": "mm_interleaved", "model": toy.section()}))
    with pytest.raises(CheckpointError, match=match):
        from_torch(source, tmp_path / "run", say=quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights"]


def test_a_missing_an_extra_and_a_misshapen_tensor(tmp_path, layout):
    tensors = toy.state(layout)
    del tensors["soi_token"]
    tensors["mm_decoder.layers.9.mlp.up_proj.weight"] = np.zeros((2, 3), np.float32)
    tensors["mm_decoder.norm.weight"] = np.zeros(15, np.float32)
    refused(
        tmp_path,
        tensors,
        r"3 tensors do not fit.*soi_token is missing \(expected \[1, 16\]\); mm_decoder.norm.weight is "
        r"\[15\], expected \[16\].*layers.9.mlp.up_proj.weight \[2, 3\] is not known.*Nothing was written",
    )


def test_the_command_says_so_in_one_line(tmp_path, layout, capsys):
    tensors = toy.state(layout)
    del tensors[UP]
    toy.save(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"family": "mm_interleaved", "model": toy.section()}))
    status = cli.main(["convert", "from-torch", str(tmp_path), f"--out={tmp_path / 'run'}"])
    lines = capsys.readouterr().err.splitlines()
    assert status == CheckpointError.exit_status and len(lines) == 1
    assert lines[0].startswith("umm: error:") and f"{UP} is missing (expected [24, 16])" in lines[0]


def test_a_constant_that_is_not_ours(tmp_path, layout):
    tensors = toy.state(layout)
    name = "visual_tokenizer.pos_embed"
    tensors[name] = tensors[name][:, ::-1]
    refused(tmp_path, tensors, rf"{name} differs from what our model computes by up to")


def test_quantised_weights(tmp_path, layout):
    tensors = toy.state(layout)
    tensors[UP] = np.zeros(tensors[UP].shape, np.int8)
    refused(tmp_path, tensors, rf"{UP} has dtype int8")


def test_an_existing_target_is_left_alone(tmp_path, converted):
    source, run = converted
    (tmp_path / "mine").write_text("keep")
    for act in (from_torch, to_torch):
        with pytest.raises(ConfigError, match="is there already"):
            act(source if act is from_torch else run, tmp_path, say=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# --- damaged files ----------------------------------------------------------------------------------


def test_a_shard_cut_short_is_named_with_its_bytes(tmp_path, converted):
    source = tmp_path / "weights"
    shutil.copytree(converted[0], source)
    shard = sorted(source.glob("*.safetensors"))[1]
    size = shard.stat().st_size
    os.truncate(shard, size - 5)
    with pytest.raises(
        CheckpointError, match=rf"{shard.name}: cut short: expected {size} bytes, found {size - 5}"
    ):
        open_source(source)
    os.truncate(shard, 20)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: cut short: its header needs"):
        open_source(source)
    os.truncate(shard, 3)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: no safetensors file, or damaged \(3 bytes"):
        open_source(source)
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=rf"{shard.name}: a git-lfs pointer"):
        open_source(source)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: no such file, though .*index.json names it"):
        open_source(source)


def test_an_index_and_its_shards_must_agree(tmp_path, converted):
    source = tmp_path / "weights"
    shutil.copytree(converted[0], source)
    index = source / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["one.more"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00003.safetensors: has no tensor one.more"):
        open_source(source)
    index.write_text('{"weight_map": {"a": "../b"}}')
    with pytest.raises(CheckpointError, match="no index of shards"):
        open_source(source)
    with pytest.raises(CheckpointError, match="no weights in there"):
        open_source(tmp_path)


@pytest.mark.parametrize("damage", ["hole", "size", "dtype", "json"])
def test_a_damaged_header_is_refused(tmp_path, damage):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    if damage == "hole":
        header["a"]["data_offsets"] = [4, 12]
    if damage == "size":
        header["a"]["shape"] = [3]
    if damage == "dtype":
        header["a"]["dtype"] = "Q4"
    text = json.dumps(header).encode() if damage != "json" else b'{"a": '
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match="a.safetensors"):
        open_source(path)


# --- pickles ----------------------------------------------------------------------------------------


def test_a_pickle_is_refused_unless_asked_for(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ConfigError, match="--allow-pickle"):
        open_source(tmp_path)
    with pytest.raises(ConfigError, match="--allow-pickle"):
        from_torch(tmp_path, tmp_path / "run", say=quiet)


def test_sharded_pickles_give_the_same_run(tmp_path, layout, mixed, converted):
    torch = pytest.importorskip("torch", reason="reading .bin files needs torch")
    source = tmp_path / "weights"
    source.mkdir()
    names, weight_map = list(mixed), {}
    for i in range(2):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        part = {}
        for name in names[i::2]:
            a = np.ascontiguousarray(mixed[name])
            if a.dtype == ml_dtypes.bfloat16:
                part[name] = torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
            else:
                part[name] = torch.from_numpy(a)
            weight_map[name] = file
        # Views of one storage, and axes in another order, are pickled as such.
        some = next(n for n in part if part[n].ndim == 2)
        part[some] = part[some].t().contiguous().t()
        torch.save(part, source / file)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "config.json").write_text(json.dumps({"family": "mm_interleaved", "model": toy.section()}))
    (source / "training_args.bin").write_bytes(b"not weights")
    from_torch(source, tmp_path / "run", allow_pickle=True, say=quiet)
    to_torch(tmp_path / "run", tmp_path / "back", say=quiet)
    same(read_export(tmp_path / "back"), mixed)

    shard = source / "pytorch_model-00002-of-00002.bin"
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=f"{shard.name}: cut short"):
        open_source(source, allow_pickle=True)


def test_code_in_a_pickle_does_not_run(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .bin files needs torch")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Evil()}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="model.bin: cannot be read as weights"):
        open_source(tmp_path / "model.bin", allow_pickle=True)
    assert not (tmp_path / "ran").exists()
    torch.save({"a": torch.zeros(2), "step": 3}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError, match="step is a int, not a tensor"):
        open_source(tmp_path / "model.bin", allow_pickle=True)


def test_without_torch_a_pickle_says_how_to_install_it(tmp_path, monkeypatch):
    (tmp_path / "model.bin").write_bytes(b"PK")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match="pip install torch"):
        open_source(tmp_path / "model.bin", allow_pickle=True)


# --- tokenizers -------------------------------------------------------------------------------------


def small_tokenizer(path: Path, size: int) -> Tokenizer:
    """A sentencepiece model of exactly `size` pieces."""
    text = "USER: the quick brown fox jumps over a lazy dog ASSISTANT: pack my box with five dozen jugs"
    made = Tokenizer.train([text], path, vocab=size, whole_words=False)
    assert made.size == size
    return made


def test_the_tokenizer_gets_the_pieces_for_images(tmp_path, converted, layout):
    source = tmp_path / "weights"
    shutil.copytree(converted[0], source)
    base = small_tokenizer(source / "tokenizer.model", toy.SOI)
    (source / "tokenizer_config.json").write_text("{}")
    from_torch(source, tmp_path / "run", say=quiet)
    extended = Tokenizer.load(tmp_path / "run" / "tokenizer.model")
    assert extended.size == base.size + 2 == toy.VOCAB
    assert [extended.id(p) for p in ("<|beginofimage|>", "<|image|>")] == [300, 301]
    assert toy.FAMILY.stream.Serializer(layout.model, extended).soi == 300  # it can be talked to
    # What PyTorch gets is what came from it.
    to_torch(tmp_path / "run", tmp_path / "back", say=quiet)
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == base.model
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == "{}"
    small_tokenizer(source / "tokenizer.model", toy.SOI - 1)
    with pytest.raises(ConfigError, match="its 299 pieces do not go with a model whose"):
        from_torch(source, tmp_path / "other", say=quiet)
    assert not (tmp_path / "other").exists()


# --- full disks and sudden ends ---------------------------------------------------------------------


def test_a_full_disk_leaves_no_folder(tmp_path, converted, monkeypatch):
    source, run = converted

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match="the disk is full"):
            to_torch(run, tmp_path / "out", say=quiet)
    writes, real = [], os.pwrite

    def late(*args):
        writes.append(args)
        return full() if len(writes) == 50 else real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", late)
        with pytest.raises(StorageError, match="the disk is full"):
            to_torch(run, tmp_path / "out", say=quiet)
    assert len(writes) == 50
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Free())
        for act, path in ((from_torch, source), (to_torch, run)):
            with pytest.raises(StorageError, match="0.00 GB are free; nothing was written"):
                act(path, tmp_path / "out", say=quiet)
    assert list(tmp_path.iterdir()) == []


class Free:
    free = 1000


LIMITED = """
import resource, sys
from umm_jax import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("way, limit", [("from-torch", 2000), ("to-torch", 100_000)])
def test_a_kernel_that_refuses_to_write_is_one_line(tmp_path, converted, way, limit):
    """RLIMIT_FSIZE: not a full disk, but the same path."""
    words = [str(converted[0])] if way == "from-torch" else [f"--run={converted[1]}"]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), "convert", way, *words, f"--out={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == StorageError.exit_status, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("umm: error:")]) == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# Slows each tensor down, so that the kill falls in the middle; prints when the first is written.
SLOW = """
import sys, time
from umm_jax import cli
from umm_jax.convert import shards
from umm_jax.train import parts
for cls in (shards.Shards, parts.PartWriter):
    def slow(self, *args, real=cls.write):
        real(self, *args)
        print("wrote", flush=True)
        time.sleep(0.05)
    cls.write = slow
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("way", ["from-torch", "to-torch"])
def test_a_kill_leaves_nothing_that_looks_complete_and_a_rerun_completes(tmp_path, converted, mixed, way):
    source, run = converted
    out, act = tmp_path / "out", from_torch if way == "from-torch" else to_torch
    words = ["convert", way, f"--out={out}", *([str(source)] if way == "from-torch" else [f"--run={run}"])]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        for line in process.stdout:
            if line.startswith("wrote"):
                break
        time.sleep(0.3)
        with pytest.raises(ConfigError, match="another process is writing there"):
            act(source if act is from_torch else run, out, say=quiet)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [p.name for p in tmp_path.iterdir()] == [".out.part"]
    assert cli.main(words) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if way == "from-torch":
        to_torch(out, tmp_path / "back", say=quiet)
        out = tmp_path / "back"
    same(read_export(out), mixed)


# --- pieces -----------------------------------------------------------------------------------------


def test_chunks_are_small_but_not_too_many():
    mib = 1 << 20
    assert chunk_shape((40, 5120, 13824), 2, True) == (1, 1707, 13824)  # three chunks a layer
    assert chunk_shape((40, 5120), 2, True) == (40, 5120)  # the norms of all layers in one
    assert chunk_shape((32002, 5120), 4, False) == (3201, 5120)
    assert chunk_shape((7,), 4, False) == (7,)
    assert chunk_shape((), 4, False) == ()
    for shape, stacked in [((40, 5120, 13824), True), ((5120, 32002), False), ((1000, 3, 3), True)]:
        chunk = chunk_shape(shape, 4, stacked)
        assert np.prod(chunk) * 4 <= 65 * mib and len(chunk) == len(shape)


def test_tensors_are_aligned_and_cut_into_shards(tmp_path):
    tensors = {
        "a": np.arange(3, dtype=np.float16),
        "b": np.arange(5, dtype=np.float64),
        "c": np.ones((2, 3), np.float32),
        "d": np.array(7, np.int64),
    }
    promised = {name: Tensor(a.shape, a.dtype) for name, a in tensors.items()}
    with Shards(tmp_path, "model", promised, limit=46) as shards:
        for name in reversed(tensors):
            shards.write(name, tensors[name])
    assert shards.files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    found = load_file(tmp_path / shards.files[0]) | load_file(tmp_path / shards.files[1])
    same(found, tensors)
    source = open_source(tmp_path)
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in source.entries.values())
    same({name: source.read(name) for name in tensors}, tensors)
    with pytest.raises(ValueError, match="never written: b"):
        with Shards(tmp_path / "..", "other", {"b": promised["b"]}, limit=9):
            pass


@pytest.mark.parametrize(
    "text, size", [("5GB", 5_000_000_000), ("1.5MiB", 1572864), ("800", 800), ("2kb", 2000)]
)
def test_sizes_on_the_command_line(text, size):
    args = cli.parser().parse_args(["convert", "to-torch", "--run=r", "--out=o", f"--shard-size={text}"])
    assert args.shard_size == size


def test_no_size_at_all():
    with pytest.raises(ConfigError, match="expected a size such as 5GB"):
        cli.parser().parse_args(["convert", "to-torch", "--run=r", "--out=o", "--shard-size=big"])
