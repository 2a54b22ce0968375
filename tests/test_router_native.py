"""Our own drawing families as experts, and experts at the side of a model that writes calls."""

import mm_interleaved_toy as toy
import numpy as np
import pytest
from flax import nnx

from umm_jax.conversation import ImageData, Mask
from umm_jax.families import get
from umm_jax.families.unified_mllm.generate import Asked
from umm_jax.markup import dialects, grammar
from umm_jax.markup.plan import Source, Step
from umm_jax.router.conformance import BOX, failures, request
from umm_jax.router.execute import Executor, box_mask
from umm_jax.router.experts import ExpertError, Medium, Registry, Request, Result, Spec
from umm_jax.router.native import Drawing
from umm_jax.router.replies import Attending


class Words(toy.Words):
    """Knows every word by spelling it with what it has."""

    def encode(self, text):
        return [self.pieces.index(w) if w in self.pieces else self.pieces.index("a") for w in text.split()]


@pytest.fixture(scope="module")
def drawing():
    config = toy.model_config()
    params = nnx.to_pure_dict(nnx.split(toy.model(config))[1])
    return Drawing(get("mm_interleaved").generate.Replier(config, params, Words()))


def test_a_drawing_family_is_an_expert(drawing):
    assert failures(drawing) == []


def test_an_edit_of_a_region_leaves_the_rest_to_the_bit(drawing):
    asked = request("image_edit")
    (edited,) = drawing.run(asked).media
    inside = box_mask([BOX], *asked.medium.value.shape[:2])
    np.testing.assert_array_equal(edited.value[~inside], asked.medium.value[~inside])
    assert (edited.value != asked.medium.value)[inside].any()
    whole = drawing.run(request("image_edit", boxed=False)).media[0].value
    assert (whole != asked.medium.value)[~inside].any(), "without a region all of it may change"


def test_objects_are_said_with_their_boxes(drawing):
    said = drawing._words(Request("layout_gen", "a table", (), (), (("a jug", (BOX,)), ("a cup", ()))))
    assert said == "a table , a jug at (250,250)(750,750) , a cup"


def test_what_the_model_cannot_do_is_an_experts_error(drawing):
    class Silent:
        params = None

        def reply(self, *asked):
            from umm_jax.conversation import Turn
            from umm_jax.families.contract import Reply

            return [Reply(Turn("assistant", ()))]

    with pytest.raises(ExpertError, match="without a picture"):
        Drawing(Silent()).run(request("image_gen"))


# --- at the side of a model that writes calls ---------------------------------------------------------------


class Painter:
    """Notes what it is asked; paints what may change."""

    spec = Spec("test.painter", "1", frozenset({"image_edit", "image_gen"}))

    def __init__(self):
        self.asked = []

    def run(self, request: Request) -> Result:
        self.asked.append(request)
        if "fail" in request.prompt:
            raise ExpertError("will not")
        if request.medium is None:
            return Result((Medium("image", np.zeros((8, 8, 3), np.uint8)),))
        value = request.medium.value.copy()
        value[... if request.region is None else request.region] = 7
        return Result((Medium("image", value),))

    def close(self):
        """Holds nothing."""


def asked(text: str, source=None, masks=(), seed=3) -> Asked:
    (call,) = grammar.parse(text, dialects.get("umm1")).calls
    step = Step(2, call, None if source is None else Source("step", 1), call.prompt)
    return Asked(step, source, masks, seed)


def test_a_call_is_done_with_its_picture_and_masks():
    painter, registry = Painter(), Registry({})
    registry.add(painter)
    attending = Attending(Executor(registry))
    source = ImageData.from_array(np.full((10, 12, 3), 200, np.uint8))
    region = np.zeros((10, 12), bool)
    region[2:4] = True
    made = attending(
        asked("<image_edit>make it blue [SEG]</image_edit>", source, (Mask.from_array("a", region),))
    )
    assert (made.array()[region] == 7).all() and (made.array()[~region] == 200).all()
    boxed = attending(asked("<image_edit>dark <box>[0, 0, 0.5, 1]</box></image_edit>", source))
    assert (boxed.array()[:, :6] == 7).all() and (boxed.array()[:, 6:] == 200).all()
    assert attending(asked("<image_gen>a ring</image_gen>")).width == 8
    assert attending(asked("<image_gen>fail</image_gen>")) is None
    assert [d.status for d in attending.done] == ["ok", "ok", "ok", "error"]
    seeds = {request.seed for request in painter.asked}
    again = Attending(Executor(registry))
    again(asked("<image_gen>a ring</image_gen>"))
    assert painter.asked[-1].seed in seeds and len(seeds) == 1, (
        "by the reply's seed and the call's place alone"
    )
