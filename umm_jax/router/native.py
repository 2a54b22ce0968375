"""Experts that are models of ours: a family that draws, asked for one picture.

umm chat --run=runs/unified --experts --drawn-by=runs/chatumm
"""

from dataclasses import replace

from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, ImageData, Part, Text, Turn
from umm_jax.errors import UserError
from umm_jax.families.boxes import in_letters
from umm_jax.families.contract import Replier
from umm_jax.router.experts import ExpertError, Medium, Request, Result, Spec, pasted

_TASKS = frozenset({"image_gen", "image_edit", "layout_gen"})


class Drawing:
    """Draws, edits, and draws objects in their places, with a trained model that answers with pictures.

    The call becomes a conversation of one user turn: the picture it works on, then its words. Objects that
    are laid out are said after them, each with its box in letters. Where a region is given, nothing outside
    of it changes: what the model drew is pasted into the picture.

    Args:
        replier: of a family that draws. name, version: what results are marked with.
        settings: how it draws; the mode is set here.
    """

    def __init__(
        self,
        replier: Replier,
        name: str = "native.drawing",
        version: str = "1",
        settings: ReplySettings | None = None,
        priority: int = 10,
    ):
        self.replier, settings = replier, settings or ReplySettings()
        self.settings = replace(settings, mode="image", max_images=1)
        self.spec = Spec(name, version, _TASKS, priority=priority)

    def run(self, request: Request) -> Result:
        parts: list[Part] = [Text(self._words(request))]
        images = {}
        if request.medium is not None:
            images["source"] = ImageData.from_array(request.medium.value)
            parts.insert(0, Image("source"))
        asked = Conversation("call", (Turn("user", tuple(parts)),), images)
        try:
            (reply,) = self.replier.reply([asked], self.settings, [request.seed % 2**32])
        except UserError as error:
            raise ExpertError(str(error)) from None
        drawn = [reply.images[p.ref] for p in reply.turn.parts if isinstance(p, Image)]
        if not drawn:
            raise ExpertError("the model answered without a picture")
        return Result((Medium("image", pasted(drawn[0].array(), request)),))

    @staticmethod
    def _words(request: Request) -> str:
        words = [request.prompt] if request.prompt else []
        for phrase, boxes in request.objects if request.task == "layout_gen" else ():
            for box in boxes or (None,):
                words.append(phrase if box is None else f"{phrase} at {in_letters(box)}")
        return " , ".join(words)

    def close(self) -> None:
        """Its parameters go with it."""
        self.replier.params = None
