"""Experts that are models of other libraries: pipelines of diffusers, and SAM or SAM 2 of transformers.

Each is told which model by an environment variable, a folder or a name on the hub, and is best served from a
process of its own, where PyTorch takes no memory from JAX::

    UMM_DIFFUSERS_MODEL=timbrooks/instruct-pix2pix umm experts --serve=adapters.diffusers
    umm chat --run=runs/unified --expert=http://127.0.0.1:8400
"""

import importlib.util
import inspect
import os
from typing import Any

import numpy as np
import PIL.Image

from umm_jax.errors import ConfigError
from umm_jax.router.experts import ExpertError, Medium, Request, Result, Spec, pasted


def _model(variable: str, what: str, package: str, model: str | None) -> str:
    """Which model to load. Raises ConfigError where none is named, or the package is missing."""
    if importlib.util.find_spec(package) is None or importlib.util.find_spec("torch") is None:
        raise ConfigError(f"needs {package} and torch: pip install 'umm_jax[torch]'")
    model = model or os.environ.get(variable, "")
    if not model:
        raise ConfigError(f"set {variable} to {what}, a folder or a name on the hub")
    return model


class Diffusers:
    """A pipeline of diffusers that makes a picture from words, or from a picture and words.

    Which of the tasks it does is seen from what its call takes: an `image` makes it an editor, which with a
    `mask_image` is told where. Sizes other than its own are resized; outside a region nothing changes.

    Args:
        model: see above. options: further arguments of the pipeline's call, such as num_inference_steps.
    """

    def __init__(self, model: str | None = None, **options: Any):
        name = _model("UMM_DIFFUSERS_MODEL", "a pipeline of diffusers", "diffusers", model)
        import torch
        from diffusers import DiffusionPipeline

        try:
            self.pipeline = DiffusionPipeline.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from None
        self.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)
        self.options, self.takes = options, set(inspect.signature(self.pipeline.__call__).parameters)
        task = "image_edit" if "image" in self.takes else "image_gen"
        version = f"{type(self.pipeline).__name__} {os.path.basename(name)}"
        self.spec = Spec("adapters.diffusers", version, frozenset({task}), priority=5)

    def run(self, request: Request) -> Result:
        import torch

        asked = {"prompt": request.prompt, "generator": torch.Generator().manual_seed(request.seed % 2**63)}
        if request.medium is not None:
            asked["image"] = PIL.Image.fromarray(request.medium.value)
            if "mask_image" in self.takes:
                whole = np.ones(request.medium.value.shape[:2], bool)
                region = whole if request.region is None else request.region
                asked["mask_image"] = PIL.Image.fromarray(region.astype(np.uint8) * 255)
        try:
            (picture, *_) = self.pipeline(**asked, **self.options).images
        except (ValueError, TypeError, RuntimeError) as error:
            raise ExpertError(f"{type(error).__name__}: {error}") from None
        drawn = np.asarray(picture.convert("RGB"))
        return Result((Medium("image", pasted(drawn, request)),))

    def close(self) -> None:
        self.pipeline = None


class Sam:
    """SAM or SAM 2: the mask of what lies in a box. It knows no words: a call without a box is beyond it."""

    def __init__(self, model: str | None = None):
        name = _model("UMM_SAM_MODEL", "a SAM or SAM 2 of transformers", "transformers", model)
        import torch
        from transformers import AutoConfig

        try:
            kind = AutoConfig.from_pretrained(name).model_type
            self.model, self.processor = _sam(kind, name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name}: {error}") from None
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        version, tasks = f"{kind} {os.path.basename(name)}", frozenset({"image_seg"})
        self.spec = Spec("adapters.sam", version, tasks, needs_box=tasks, priority=5)

    def run(self, request: Request) -> Result:
        import torch

        if not request.boxes:
            raise ExpertError("needs a box: it knows no words")
        height, width = request.medium.value.shape[:2]
        boxes = [[x0 * width, y0 * height, x1 * width, y1 * height] for x0, y0, x1, y1 in request.boxes]
        picture = PIL.Image.fromarray(request.medium.value)
        asked = self.processor(images=picture, input_boxes=[boxes], return_tensors="pt")
        names = [name for name in ("original_sizes", "reshaped_input_sizes") if name in asked]
        sizes = [asked.pop(name) for name in names]
        with torch.no_grad():
            found = self.model(**asked.to(self.model.device), multimask_output=False)
        masks = self.processor.post_process_masks(found.pred_masks.cpu(), *sizes)[0]
        return Result(tuple(Medium("mask", mask[0].numpy().astype(bool)) for mask in masks))

    def close(self) -> None:
        self.model = None


def _sam(kind: str, name: str) -> tuple[Any, Any]:
    """Model and processor. Raises ValueError for what is neither."""
    import transformers

    if kind == "sam":
        return transformers.SamModel.from_pretrained(name), transformers.SamProcessor.from_pretrained(name)
    if kind in ("sam2", "sam2_video"):
        return transformers.Sam2Model.from_pretrained(name), transformers.Sam2Processor.from_pretrained(name)
    raise ValueError(f"a model of type {kind!r} is neither SAM nor SAM 2")
