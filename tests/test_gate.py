"""The gate for pictures: what is let in as it is, what is changed, what is rejected, and what it survives."""

import io
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest

from umm_jax.conversation import ImageData
from umm_jax.data.gate import Gate, Limits, examine
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import ConfigError

LIMITS = Limits()


def encoded(image: PIL.Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height: int = 40, width: int = 60, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


PHOTOGRAPH = PIL.Image.fromarray(noise())


def rejected(data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(Rejected) as caught:
        examine(data, limits)
    return caught.value.reason


# --- what is kept, and what is changed ----------------------------------------------------------------


@pytest.mark.parametrize(
    "image, format",
    [
        (PHOTOGRAPH, "JPEG"),
        (PHOTOGRAPH, "PNG"),
        (PHOTOGRAPH, "WEBP"),
        (PHOTOGRAPH, "BMP"),
        (PHOTOGRAPH.convert("L"), "JPEG"),
        (PHOTOGRAPH.convert("P"), "GIF"),
        (PHOTOGRAPH.convert("1"), "PNG"),
        (PHOTOGRAPH.convert("RGBA"), "PNG"),  # opaque
    ],
)
def test_plain_pictures_are_kept_byte_for_byte(image, format):
    data = encoded(image, format)
    admitted, changes = examine(data, LIMITS)
    assert admitted.data == data and changes == ()
    assert (admitted.width, admitted.height) == (60, 40) and admitted.array().shape == (40, 60, 3)


def test_a_picture_is_turned_as_its_camera_was():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    dark_left = PIL.Image.fromarray(
        np.hstack([np.zeros((40, 30, 3), np.uint8), np.full((40, 30, 3), 255, np.uint8)])
    )
    admitted, changes = examine(encoded(dark_left, "JPEG", exif=exif), LIMITS)
    assert changes == ("turned upright",) and admitted.mime == "image/jpeg"
    pixels = admitted.array().astype(int)
    assert pixels.shape == (60, 40, 3) and pixels[:20].max() < 20 and pixels[-20:].min() > 235
    exif[0x0112] = 1
    assert examine(encoded(dark_left, "JPEG", exif=exif), LIMITS).changes == ()


def test_sixteen_bits_keep_their_greys():
    grey = noise(channels=1)[..., 0]
    deep = PIL.Image.fromarray(grey.astype(np.uint16) * 257)
    admitted, changes = examine(encoded(deep, "PNG"), LIMITS)
    assert changes == ("16 bits made 8",)
    assert (admitted.array() == grey[..., None]).all(), "plain conversion would make nearly all of it white"


def test_cmyk_becomes_rgb():
    red = PIL.Image.new("RGB", (20, 20), (255, 0, 0)).convert("CMYK")
    admitted, changes = examine(encoded(red, "JPEG"), LIMITS)
    assert changes == ("CMYK made RGB",) and admitted.mime == "image/jpeg"
    with PIL.Image.open(io.BytesIO(admitted.data)) as opened:
        assert opened.mode == "RGB"
    assert np.abs(admitted.array().astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode):
    if mode == "P":
        image = PIL.Image.new("P", (10, 10), 1)
        image.putpalette([0, 0, 0, 90, 90, 90])
        data = encoded(image, "PNG", transparency=1)
    else:
        image = PHOTOGRAPH.convert(mode)
        image.putalpha(PIL.Image.new("L", image.size, 0))
        data = encoded(image, "PNG")
    admitted, changes = examine(data, LIMITS)
    assert changes == ("laid on white",) and (admitted.array() == 255).all()


def test_the_first_frame_of_many_is_taken():
    frames = [PIL.Image.new("RGB", (10, 10), (k, k, k)) for k in (10, 90, 200)]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0],
            format,
            save_all=True,
            append_images=frames[1:],
            **{"lossless": True} if format == "WEBP" else {},
        )
        admitted, changes = examine(data, LIMITS)
        assert "first frame taken" in changes, format
        assert admitted.mime == "image/png" and (admitted.array() == 10).all()
        with PIL.Image.open(io.BytesIO(admitted.data)) as opened:
            assert not getattr(opened, "is_animated", False)


def test_colours_of_another_space_are_brought_to_srgb():
    # The other space is sRGB with red and blue exchanged.
    srgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    assert examine(encoded(PHOTOGRAPH, "JPEG", icc_profile=srgb), LIMITS).changes == ()
    swapped = srgb.replace(b"rXYZ", b"tmp.").replace(b"bXYZ", b"rXYZ").replace(b"tmp.", b"bXYZ")
    swapped = swapped.replace(b"sRGB", b"BGR ").replace(
        "sRGB".encode("utf-16-be"), "BGR ".encode("utf-16-be")
    )
    red = PIL.Image.new("RGB", (10, 10), (255, 0, 0))
    admitted, changes = examine(encoded(red, "PNG", icc_profile=swapped), LIMITS)
    assert changes == ("colours brought to sRGB",)
    assert admitted.array()[0, 0].argmax() == 2, "red of that profile is blue"
    assert examine(encoded(red, "PNG", icc_profile=b"no profile at all"), LIMITS).changes == ()


# --- what is rejected ---------------------------------------------------------------------------------


def test_a_bomb_is_known_by_its_header():
    """Fifty thousand pixels square in fewer than 200 bytes; unpacked it would take 7.5 GB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    began = time.process_time()
    assert rejected(data + chunk(b"IEND", b"")) == "too many pixels"
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "no picture"),
        (b"<html>not found</html>", "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage", "no picture"),
        (encoded(PHOTOGRAPH, "TIFF"), "no picture"),
        (encoded(PHOTOGRAPH, "JPEG")[:900], "damaged picture"),
        (encoded(PHOTOGRAPH, "PNG")[:-500], "damaged picture"),
        (encoded(PHOTOGRAPH, "PNG")[:20], "damaged picture"),
        (encoded(PIL.Image.new("RGB", (1, 200)), "PNG"), "extreme aspect"),
        (encoded(PIL.Image.new("RGB", (201, 10)), "PNG"), "extreme aspect"),
    ],
)
def test_reasons(data, reason):
    assert rejected(data) == reason


def test_limits():
    data = encoded(PHOTOGRAPH, "PNG")
    assert rejected(data, Limits(bytes=len(data) - 1)) == "too many bytes"
    assert rejected(data, Limits(pixels=2399)) == "too many pixels"
    assert rejected(data, Limits(aspect=1.4)) == "extreme aspect"
    assert rejected(data, Limits(formats=("JPEG",))) == "no picture"
    assert examine(data, Limits(bytes=len(data), pixels=2400, aspect=1.5, formats=("PNG",))).changes == ()
    for wrong in (
        dict(bytes=0),
        dict(pixels=-1),
        dict(aspect=0.5),
        dict(formats=("EPS",)),
        dict(seconds=0.0),
    ):
        with pytest.raises(ConfigError):
            Limits(**wrong)


def test_damaged_bytes_are_rejected_or_decoded_and_never_anything_else():
    rng = np.random.default_rng(1)
    originals = [encoded(PHOTOGRAPH, format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    reasons = set()
    for k in range(600):
        data = bytearray(originals[k % 5])
        for at in rng.integers(0, len(data), rng.integers(1, 12)):
            data[at] = rng.integers(256)
        data = bytes(data[: rng.integers(1, len(data)) if k % 3 == 0 else len(data)])
        try:
            admitted = examine(data, LIMITS)
        except Rejected as error:
            reasons.add(error.reason)
        else:
            assert admitted.image.array().shape == (admitted.image.height, admitted.image.width, 3)
    assert {"damaged picture", "no picture"} <= reasons


# --- the process --------------------------------------------------------------------------------------

SLOW = """
import os, sys, time
import PIL.Image, PIL.ImageFile

class Sleeper(PIL.ImageFile.ImageFile):
    format, format_description = "BMP", "does as it is told"

    def _open(self):
        self._size, self._mode = (4, 4), "RGB"

    def load(self):
        self.fp.seek(4)
        word = self.fp.read(4)
        if word == b"slow":
            time.sleep(60)
        os._exit(3)

PIL.Image.preinit(); PIL.Image.init()
PIL.Image.register_open("BMP", Sleeper, lambda start: start[:4] == b"FAKE")
from umm_jax.data.gate import serve
serve()
"""


def test_the_process_gives_what_examine_gives():
    gate = Gate(LIMITS)
    for data in (encoded(PHOTOGRAPH, "JPEG"), encoded(PHOTOGRAPH.convert("CMYK"), "JPEG")):
        assert gate.admit(data) == examine(data, LIMITS)
    with pytest.raises(Rejected) as caught:
        gate.admit(b"nothing")
    assert caught.value.reason == "no picture"
    first = gate._process
    gate.admit(encoded(PHOTOGRAPH, "PNG"))
    assert gate._process is first, "one process for all of them"
    gate.close()
    assert first.poll() is not None


def test_a_picture_that_hangs_or_crashes_the_decoder_is_rejected_and_the_next_is_not(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    gate = Gate(Limits(seconds=1.0), program=[str(tmp_path / "slow.py")])
    good = encoded(PHOTOGRAPH, "PNG")
    for word, reason in ((b"slow", "too slow"), (b"dies", "crashed the decoder")):
        began = time.monotonic()
        with pytest.raises(Rejected) as caught:
            gate.admit(b"FAKE" + word + bytes(64))
        assert caught.value.reason == reason and time.monotonic() - began < 30
        assert gate.admit(good).image == ImageData(good, "image/png", 60, 40)
    gate.close()


def test_the_process_ends_with_its_owner():
    program = (
        "from umm_jax.data.gate import Gate, Limits; import sys; sys.path.insert(0, 'tests');"
        "gate = Gate(Limits())\n"
        "try: gate.admit(b'nothing')\n"
        "except Exception: print(gate._process.pid, flush=True)\n"
        "import os; os._exit(1)"  # no clean-up of any kind
    )
    pid = int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there")
