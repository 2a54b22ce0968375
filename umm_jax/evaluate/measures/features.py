"""Networks that turn pictures into numbers: what FID and the likeness of pictures stand on.

A setting names one in a few letters, and nothing is ever fetched:

    clean-fid:FOLDER   Inception v3 as the package clean-fid has it, [N, 2048]; the folder holds
                       inception-2015-12-05.pt
    clip:FOLDER        a CLIP of transformers with its own processor, [N, D] of length 1; the folder holds
                       its config, weights and processor
    module:function    one of yours, called as f([uint8[h, w, 3], ...]) -> [N, D]

Figures by two of them are not comparable: how a picture is brought to a network's size alone moves FID by
more than most models differ.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image

from umm_jax.data.entries import extra
from umm_jax.errors import ConfigError, DataError

# Pictures of any sizes, each uint8[h, w, 3], to features [N, D].
Extractor = Callable[[Sequence[np.ndarray]], np.ndarray]

_WEIGHTS = "inception-2015-12-05.pt"


@cache
def extractor(name: str) -> Extractor:
    """The one that a setting names, loaded once.

    Raises:
        ConfigError: there is no such network, or what it needs is missing.
    """
    kind, _, where = name.partition(":")
    if not where:
        raise ConfigError(
            f"features must be clean-fid:FOLDER, clip:FOLDER or module:function, they are {name!r}"
        )
    if kind in _KINDS:
        return _KINDS[kind](Path(where))
    try:
        return getattr(importlib.import_module(kind), where)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"features {name!r}: {error}") from None


def of(name: str, images: Sequence[np.ndarray]) -> np.ndarray:
    """float32[N, D] of pictures, each uint8[h, w, 3].

    Raises:
        ConfigError: see :func:`extractor`. DataError: it gave another shape, or numbers that are not finite.
    """
    found = np.asarray(extractor(name)(images), np.float32)
    if found.ndim != 2 or len(found) != len(images) or not np.isfinite(found).all():
        raise DataError(
            f"features {name!r}: expected finite numbers [{len(images)}, D], got {list(found.shape)}"
        )
    return found


def middle(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[size, size, 3]: the shorter side brought to `size` (bicubic), the middle of the longer kept."""
    picture = PIL.Image.fromarray(image)
    short = min(picture.size)
    wide, high = (side * size // short for side in picture.size)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    resized = picture.resize((wide, high), PIL.Image.Resampling.BICUBIC)
    return np.array(resized.crop((left, top, left + size, top + size)))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[N]: the cosine of each row of a [N, D] with the same row of b; 0 where one has no length."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(1), lengths, out=np.zeros(len(a)), where=lengths > 0)


def _clean_fid(folder: Path) -> Extractor:
    torch = extra("torch", "features of pictures", "torch", "torch")
    resize = extra("cleanfid.resize", "features of pictures", "clean-fid", "fid").build_resizer("clean")
    inception = extra("cleanfid.inception_torchscript", "features of pictures", "clean-fid", "fid")
    if not (folder / _WEIGHTS).exists():
        raise ConfigError(f"features need {folder / _WEIGHTS}, the weights that clean-fid fetches")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = inception.InceptionV3W(str(folder), download=False).to(device).eval()

    def features(images: Sequence[np.ndarray]) -> np.ndarray:
        batch = np.stack([resize(image).transpose(2, 0, 1) for image in images])
        with torch.no_grad():
            return network(torch.from_numpy(batch).to(device)).cpu().numpy()

    return features


def _clip(folder: Path) -> Extractor:
    torch = extra("torch", "features of pictures", "torch", "torch")
    transformers = extra("transformers", "features of pictures", "transformers", "torch")
    if not (folder / "config.json").exists():
        raise ConfigError(f"features need a CLIP of transformers in {folder}: it has no config.json")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
    process = transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)

    def features(images: Sequence[np.ndarray]) -> np.ndarray:
        pixels = process(images=[PIL.Image.fromarray(i) for i in images], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found = network.get_image_features(pixel_values=pixels.to(device))
        found = getattr(found, "pooler_output", found)  # newer releases wrap it
        return torch.nn.functional.normalize(found, dim=-1).float().cpu().numpy()

    return features


_KINDS: dict[str, Callable[[Path], Extractor]] = {"clean-fid": _clean_fid, "clip": _clip}
