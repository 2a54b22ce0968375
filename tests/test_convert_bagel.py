"""BAGEL's folder both ways: the recorded weights as the release lays them out, and an export of ours."""

import json
import shutil

import parity
import pytest
from safetensors.numpy import load_file, save_file

from umm_jax import cli
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.families.chatumm import weights

FIXTURE = parity.FOLDER.parent / "bagel"
pytestmark = pytest.mark.skipif(
    not (FIXTURE / "fixture.json").exists(),
    reason=f"reference tensors not found at {FIXTURE}; set UMM_PARITY_DIR to run this comparison",
)


@pytest.fixture
def released(tmp_path):
    """The recorded toy as a folder of the release's layout."""
    folder = tmp_path / "bagel"
    folder.mkdir()
    shutil.copy(FIXTURE / "model.safetensors", folder / "ema.safetensors")
    shutil.copy(FIXTURE / "vae_model.safetensors", folder / "ae.safetensors")
    config = json.loads((FIXTURE / "fixture.json").read_text())["config"]
    (folder / "llm_config.json").write_text(json.dumps(config["llm"]))
    # The reference counts the layers that run; a file of the release counts one more.
    vit = config["vit"] | {"num_hidden_layers": config["vit"]["num_hidden_layers"] + 1}
    (folder / "vit_config.json").write_text(json.dumps(vit))
    for path in folder.iterdir():
        path.chmod(0o644)
    return folder


def test_its_tokenizer_comes_along(released, run_config, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made.save(str(released / "tokenizer.json"))
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["convert", "from-torch", str(released), f"--out={run}", f"--config={run_config}"]) == 0
    loaded = Tokenizer.load(run / "tokenizer.model")
    assert loaded.id("<|im_end|>") == 3 and loaded.encode("ab") == [0, 1]
    assert cli.main(["convert", "to-torch", f"--run={run}", f"--out={out}"]) == 0
    assert (out / "tokenizer.json").read_bytes() == (released / "tokenizer.json").read_bytes()
    assert not (out / "tokenizer.model").exists()


@pytest.fixture
def run_config(tmp_path):
    """A run config of its sizes: the toy's autoencoder is not the one every BAGEL has."""
    found = json.loads((FIXTURE / "fixture.json").read_text())["config"]
    shapes = {}
    for name, prefix in (("model", ""), ("vae_model", weights.AUTOENCODER)):
        tensors = load_file(FIXTURE / f"{name}.safetensors")
        shapes |= {prefix + key: value.shape for key, value in tensors.items()}
    from umm_jax.config import to_dict

    model = to_dict(weights.config_of(found, shapes))
    path = tmp_path / "toy.json"
    path.write_text(json.dumps({"family": "chatumm", "model": model}))
    return path


def test_there_and_back_gives_the_same_files(released, run_config, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    assert cli.main(["convert", "from-torch", str(released), f"--out={run}", f"--config={run_config}"]) == 0
    assert cli.main(["convert", "to-torch", f"--run={run}", f"--out={out}"]) == 0
    told = capsys.readouterr().out
    for file in ("ema.safetensors", "ae.safetensors"):
        before, after = load_file(released / file), load_file(out / file)
        assert set(before) == set(after)
        for name, array in before.items():
            assert after[name].dtype == array.dtype and after[name].tobytes() == array.tobytes(), name
    names = {path.name for path in out.iterdir()}
    assert {
        "llm_config.json",
        "vit_config.json",
        "config.json",
        "README.md",
        "parity.json",
        "sha256sums",
    } < names
    assert not any("index" in name or "model-0" in name for name in names)
    count = sum(len(load_file(released / file)) for file in ("ema.safetensors", "ae.safetensors"))
    assert f"{count} of {count} are bit for bit what they came as" in told
    # An export of ours says itself what it is.
    again = tmp_path / "again"
    assert cli.main(["convert", "from-torch", str(out), f"--out={again}"]) == 0


def test_what_its_config_files_say_are_the_sizes(released, run_config):
    config = weights.config_of(
        {key: json.loads((released / file).read_text()) for key, file in weights.FOLDER.configs.items()},
        {name: a.shape for name, a in load_file(released / "ema.safetensors").items()},
    )
    written = weights.FOLDER.describe(config)
    assert config.vision.layers == 3 and written["vit"]["num_hidden_layers"] == 4
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert written["llm"][key] == json.loads((released / "llm_config.json").read_text())[key]


def test_a_tensor_that_is_missing_is_named_and_nothing_is_written(released, run_config, tmp_path, capsys):
    tensors = load_file(released / "ae.safetensors")
    tensors.pop("decoder.conv_out.bias")
    save_file(tensors, released / "ae.safetensors")
    run = tmp_path / "run"
    arguments = ["convert", "from-torch", str(released), f"--out={run}", f"--config={run_config}"]
    assert cli.main(arguments) == 4
    assert "ae.decoder.conv_out.bias is missing" in capsys.readouterr().err and not run.exists()
