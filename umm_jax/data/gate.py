"""The gate pictures of foreign data pass: caps before decoding, then one plain form, or a reason why not.

Let in is what a trainer can read without a second thought: a known format, whole, of bounded bytes, pixels
and aspect, upright, of one frame, opaque, in sRGB. Bytes that are so already are kept as they are; others are
decoded, changed and encoded again, and the changes are named. The rest is Rejected, with its reason. Nothing
is repaired by guessing.

Decoders are C code that may hang or crash, so :class:`Gate` runs :func:`examine` in a process of its own,
with a time limit for each picture, and starts another when one is lost.
"""

import dataclasses
import io
import json
import multiprocessing
import multiprocessing.connection
import subprocess
import sys
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps

from umm_jax.conversation import ImageData
from umm_jax.data.quarantine import Rejected
from umm_jax.errors import ConfigError, DataError

# Their Pillow names; none that Pillow hands to another program (EPS would start Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True)
class Limits:
    """What a picture may be.

    Attributes:
        bytes: as encoded. pixels: as its header says, before anything is decoded.
        aspect: longer side by shorter side.
        formats: of FORMATS.
        seconds: for one picture, whatever it does.
    """

    bytes: int = 20 << 20
    pixels: int = 64_000_000
    aspect: float = 20.0
    formats: tuple[str, ...] = FORMATS
    seconds: float = 20.0

    def __post_init__(self):
        if min(self.bytes, self.pixels, self.seconds) <= 0 or self.aspect < 1:
            raise ConfigError("limits of pictures must be positive, their aspect at least 1")
        if unknown := set(self.formats) - set(FORMATS):
            raise ConfigError(f"picture formats {sorted(unknown)} are not among {', '.join(FORMATS)}")


class Admitted(NamedTuple):
    """A picture that was let in, and what had to be changed in it, in words for counting."""

    image: ImageData
    changes: tuple[str, ...] = ()


def examine(data: bytes, limits: Limits) -> Admitted:
    """The picture in its plain form. Raises Rejected."""
    if len(data) > limits.bytes:
        raise Rejected("too many bytes", f"{len(data)} bytes, {limits.bytes} are allowed")
    if not data:
        raise Rejected("no picture", "an empty file")
    try:
        with warnings.catch_warnings():
            # Of bombs, Pillow only warns at first; of broken metadata too, which is no harm.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(data), formats=limits.formats) as opened:
                _check_size(opened.size, limits)
                return _plain(opened, data)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise Rejected("too many pixels", str(error)) from None
    except PIL.UnidentifiedImageError:
        formats = ", ".join(limits.formats)
        raise Rejected(
            "no picture", f"{len(data)} bytes that are no picture of the formats {formats}"
        ) from None
    except Rejected:
        raise
    except Exception as error:  # Pillow raises many kinds, all of which mean the same here
        raise Rejected("damaged picture", f"{len(data)} bytes that cannot be decoded: {error}") from None


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if min(size) < 1:
        raise Rejected("damaged picture", f"{width} x {height} pixels")
    if width * height > limits.pixels:
        raise Rejected("too many pixels", f"{width} x {height} pixels, {limits.pixels} are allowed")
    if max(size) > limits.aspect * min(size):
        raise Rejected(
            "extreme aspect", f"{width} x {height} pixels; at most {limits.aspect:g} to 1 is allowed"
        )


# --- one plain form ---------------------------------------------------------------------------------------


def _plain(opened: PIL.Image.Image, data: bytes) -> Admitted:
    mime, photograph = opened.get_format_mimetype(), opened.format in ("JPEG", "MPO")
    changes = []
    if getattr(opened, "is_animated", False):
        changes.append("first frame taken")  # the others are never looked at: there may be thousands
    opened.load()
    image = opened
    for change in (_upright, _in_srgb, _eight_bits, _opaque):
        image, said = change(image)
        changes += said
    if not changes:
        return Admitted(ImageData(data, mime, *image.size))
    buffer = io.BytesIO()
    if photograph:
        image.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        image.convert("RGB").save(buffer, "PNG", compress_level=6)
    made = ImageData(buffer.getvalue(), "image/jpeg" if photograph else "image/png", *image.size)
    return Admitted(made, tuple(changes))


def _upright(image: PIL.Image.Image):
    try:
        turned = PIL.ImageOps.exif_transpose(image)
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF raises many kinds; whoever shows such a picture does not turn it
        return image, []
    return (image, []) if orientation in (0, 1) else (turned, ["turned upright"])


def _in_srgb(image: PIL.Image.Image):
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "L", "CMYK"):
        return image, []
    try:
        read = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = PIL.ImageCms.getProfileDescription(read)
        if "srgb" in name.lower() or image.mode == "L":
            return image, []
        srgb = PIL.ImageCms.createProfile("sRGB")
        return PIL.ImageCms.profileToProfile(image, read, srgb, outputMode="RGB"), ["colours brought to sRGB"]
    except (PIL.ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image, []  # no profile that can be read: the colours are taken as they stand


def _eight_bits(image: PIL.Image.Image):
    if image.mode == "CMYK":
        return image.convert("RGB"), ["CMYK made RGB"]
    if image.mode.startswith("I"):
        # Pillow's own conversion would clip everything above 255 to white.
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return PIL.Image.fromarray(grey), ["16 bits made 8"]
    if image.mode not in ("1", "L", "P", "RGB", "LA", "PA", "RGBA"):
        raise Rejected("unknown colours", f"pixels of the kind {image.mode}")
    return image, []


def _opaque(image: PIL.Image.Image):
    if not (image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info):
        return image, []
    image = image.convert("RGBA")
    if image.getchannel("A").getextrema()[0] == 255:
        return image, []  # dropping its alpha is exact, and done whenever it is decoded
    white = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(white, image), ["laid on white"]


# --- a process for it -------------------------------------------------------------------------------------


class Gate:
    """Examines pictures in a process of its own; a picture that hangs or crashes it is rejected.

    The process is started when first needed and ends with this one. Can be pickled; a copy starts its own.
    """

    def __init__(self, limits: Limits, program: Sequence[str] = ("-m", "umm_jax.data.gate")):
        """`program` is what Python is to run; it calls :func:`serve` in the end."""
        self.limits, self._program = limits, tuple(program)
        self._process: subprocess.Popen | None = None
        self._pipe: multiprocessing.connection.Connection | None = None
        self._ending: weakref.finalize | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_process": None, "_pipe": None, "_ending": None}

    def admit(self, data: bytes) -> Admitted:
        """As :func:`examine`. Raises Rejected, for "too slow" and "crashed the decoder" too."""
        if len(data) > self.limits.bytes:
            raise Rejected("too many bytes", f"{len(data)} bytes, {self.limits.bytes} are allowed")
        if self._process is None:
            self._start()
        try:
            self._pipe.send_bytes(data)
            if not self._pipe.poll(self.limits.seconds):
                self.close()
                raise Rejected("too slow", f"not decoded within {self.limits.seconds:g} seconds")
            said = json.loads(self._pipe.recv_bytes())
            changed = self._pipe.recv_bytes() if said.get("changes") else data
        except (EOFError, OSError):
            self.close()
            raise Rejected("crashed the decoder", f"{len(data)} bytes at which the decoder died") from None
        if "reason" in said:
            raise Rejected(said["reason"], said["message"])
        return Admitted(ImageData(changed, said["mime"], *said["size"]), tuple(said["changes"]))

    def close(self) -> None:
        """Ends the process; the next picture starts another."""
        if self._process is not None:
            self._ending()
        self._process = self._pipe = self._ending = None

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        limits = json.dumps(dataclasses.asdict(self.limits))
        command = [sys.executable, *self._program, str(theirs.fileno()), limits]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self._ending = weakref.finalize(self, _end, self._process, self._pipe)
        # Starting takes a second or more on a busy machine, and is nobody's picture's fault.
        try:
            ready = self._pipe.poll(60) and self._pipe.recv_bytes() == b"ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            self.close()
            raise DataError("the process that decodes pictures did not start; is there memory for it?")


def _end(process: subprocess.Popen, pipe: multiprocessing.connection.Connection) -> None:
    process.kill()
    process.wait()
    pipe.close()


def serve() -> None:
    """The process of a :class:`Gate`, until its pipe is closed."""
    pipe = multiprocessing.connection.Connection(int(sys.argv[-2]))
    given = json.loads(sys.argv[-1])
    limits = Limits(**{**given, "formats": tuple(given["formats"])})
    PIL.Image.MAX_IMAGE_PIXELS = limits.pixels
    pipe.send_bytes(b"ready")
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        try:
            image, changes = examine(data, limits)
        except Rejected as error:
            pipe.send_bytes(json.dumps({"reason": error.reason, "message": str(error)}).encode())
            continue
        said = {"mime": image.mime, "size": [image.width, image.height], "changes": changes}
        pipe.send_bytes(json.dumps(said).encode())
        if changes:
            pipe.send_bytes(image.data)


if __name__ == "__main__":
    serve()
