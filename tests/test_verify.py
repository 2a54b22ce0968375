"""The reference's tensors, all of them, and what `umm convert verify` says where something is wrong."""

import json
import shutil

import numpy as np
import parity
import pytest
from safetensors.numpy import load_file, save_file

from umm_jax import cli
from umm_jax.convert import verify
from umm_jax.convert.fixtures import mm_interleaved as fixtures

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


def test_a_folder_that_is_none_of_ours(tmp_path, capsys):
    assert cli.main(["convert", "verify", str(tmp_path)]) == 4
    assert "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert cli.main(["convert", "verify", str(tmp_path)]) == 4
    assert "no layout known here (mm_interleaved)" in capsys.readouterr().err


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
