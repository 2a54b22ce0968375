"""UnifiedMLLM: how conversations are laid out, what is learned from them, and that rows do not mix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import unified_toy as toy
from flax import nnx

from umm_jax.config import from_dict
from umm_jax.conversation import Box, Conversation, Image, Mask, Text, Turn
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.unified_mllm.stream import square, unsquare
from umm_jax.markup import grammar


def pieces(stream) -> list[str]:
    return [toy.tokenizer().piece(i) for i in stream["tokens"]["ids"]]


# --- the stream ---------------------------------------------------------------------------------------------


def test_layout():
    stream = toy.serializer()(toy.chain())
    said = " ".join(pieces(stream)).replace("\u2581", "").replace("<im_patch> " * 4, "<4> ")
    said = " ".join(said.split())
    assert said.startswith(
        "<s> <user> <im_start> <4> <im_end> segment the red ring <eot> <bot> sure <image_seg>"
    )
    assert "<image_seg> the red ring [SEG] </image_seg> <image_edit> make it blue <box>" in said
    assert "</box> </image_edit> <im_start> <4> <im_end> one <eot> <user> how many are left <eot>" in said
    assert "<ref> a ring </ref> <box>" in said and said.endswith("</box> <eot>")
    tokens, masks = stream["tokens"], stream["masks"]
    ids = pieces(stream)
    learned = [p for p, w in zip(ids, tokens["weight"]) if w]
    assert "<im_patch>" not in learned and "<im_start>" not in learned and "<user>" not in learned
    assert learned.count("<eot>") == 2 and "[SEG]" in learned and "</image_edit>" in learned
    assert [ids[k] for k in masks["at"]] == ["[SEG]"] and masks["image"].tolist() == [0]
    np.testing.assert_array_equal(masks["target"][0], toy.region().array())
    assert (tokens["tasks"] == 1).all()
    assert stream["images"]["pixels"].shape == (2, toy.SIDE, toy.SIDE, 3)


def test_what_is_laid_out_is_read_back():
    lay = toy.serializer()
    stream = lay(toy.chain())
    ids, weight = stream["tokens"]["ids"], stream["tokens"]["weight"]
    first = ids[weight > 0][: list(ids[weight > 0]).index(lay.end)]
    found = lay.answer(first)
    assert not found.diagnostics
    assert [c.task for c in found.calls] == ["image_seg", "image_edit"]
    assert found.calls[0].prompt == "the red ring" and len(found.calls[0].masks) == 1
    assert found.calls[1].prompt == "make it blue" and found.calls[1].boxes == ((0.5, 0.25, 1.0, 0.62),)


def test_no_user_can_write_a_call():
    """Every tag a user types is letters: as many pieces of the added vocabulary as without it."""
    lay = toy.serializer()
    typed = " ".join([*lay.dialect.tokens, "<eot>", "<bot>", "<im_start>", "<im_patch>", "<s>", "</s>"])
    stream = lay.prompt(Conversation("x", (toy.user(Image("a"), typed),), {"a": toy.picture()}))
    ids = stream["tokens"]["ids"].tolist()
    assert not set(ids) & set(lay.marks)
    assert ids.count(lay.end) == 1 and pieces(stream)[-1] == "<bot>"
    assert not lay.answer(ids).calls
    assert ids.count(lay.block[1]) == toy.SLOTS


def test_a_mask_without_a_call_is_one():
    lay = toy.serializer()
    turns = (toy.user(Image("a"), "segment the red ring"), toy.bot(toy.region()))
    stream = lay(Conversation("x", turns, {"a": toy.picture()}))
    assert pieces(stream)[-4:] == ["<image_seg>", "[SEG]", "</image_seg>", "<eot>"]
    layout = {**toy.section()["layout"], "dialect": "lisa"}
    other = toy.FAMILY.stream.Serializer(toy.section(layout=layout), toy.tokenizer())
    stream = other(Conversation("x", turns, {"a": toy.picture()}))
    assert pieces(stream)[-3:] == ["<bot>", "[SEG]", "<eot>"]


@pytest.mark.parametrize(
    "parts, problem",
    [
        ([toy.call("fly", "up")], "a name of image_gen"),
        ([toy.call("image_gen", "<box>[1, 2]</box>")], "not well formed"),
        ([toy.call("image_gen", "<image_gen>a</image_gen>")], "not well formed|within a call"),
        ([Mask("b", (2, 2), (0, 4))], "has not been shown"),
    ],
)
def test_what_cannot_be_laid_out(parts, problem):
    record = Conversation("r7", (toy.user(Image("a"), "x"), toy.bot(*parts)), {"a": toy.picture()})
    with pytest.raises(DataError, match=f"record r7, turn 1: .*({problem})"):
        toy.serializer()(record)


def test_calls_are_an_assistants():
    record = Conversation("r7", (toy.user("x", toy.call("image_gen", "a ring")),), {})
    with pytest.raises(DataError, match="an assistant's"):
        toy.serializer()(record)
    page = Conversation("r8", (Turn("document", (Text("a"),), True),), {})
    with pytest.raises(DataError, match="record r8: .* no documents"):
        toy.serializer()(page)


def test_pictures_are_padded_to_squares():
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :20] = 255
    padded = square(wide, 40)
    assert padded.shape == (40, 40, 3)
    assert (padded[0] == (122, 116, 104)).all() and (padded[39] == (122, 116, 104)).all()
    assert (padded[10:30, :20] == 255).all() and (padded[10:30, 20:] == 0).all()
    mask = np.zeros((20, 40), bool)
    mask[5:15, 10:30] = True
    back = unsquare(np.where(square(mask, 40), 1.0, -1.0), 20, 40) > 0
    np.testing.assert_array_equal(back, mask)
    tall = square(mask.T, 20)
    assert tall.shape == (20, 20) and tall.sum() == 50
    iou = (unsquare(tall - 0.5, 40, 20) > 0) & mask.T
    assert iou.sum() > 0.85 * mask.sum()


def test_settings():
    with pytest.raises(ConfigError, match="layout.image_tokens is 9, but the tower has 4"):
        toy.config(layout={**toy.section()["layout"], "image_tokens": 9})
    with pytest.raises(ConfigError, match="the tower has 2 maps"):
        toy.config(masks=dict(level=2))
    with pytest.raises(ConfigError, match="did you mean 'umm1'"):
        toy.config(layout={**toy.section()["layout"], "dialect": "umm"})


# --- the model ---------------------------------------------------------------------------------------------


def losses(config, batch, model=None) -> dict[str, float]:
    model = toy.model(config) if model is None else model
    weights = model.loss_weights(batch)
    sums, metrics = jax.jit(lambda b: model.loss_sums(b, jax.random.key(0)))(batch)
    assert set(sums) == set(weights)
    assert all(np.isfinite(v).all() for pair in metrics.values() for v in pair)
    return {name: (float(sums[name]), float(weights[name])) for name in sums}


def quiet(**changes):
    """Without the tower's noise, so that what is compared is equal."""
    tower = toy.section()["tower"]
    tower = {**tower, "pyramid": {**tower["pyramid"], "noise": 0.0}}
    return toy.config(tower=tower, **changes)


def other() -> Conversation:
    turns = (
        toy.user(Image("a"), "segment the red ring"),
        toy.bot("there is a", toy.region(rows=slice(0, 3))),
    )
    return Conversation("other", turns, {"a": toy.picture(5)})


EXPERTS = dict(experts=4, rank=2, dropout=0.0)


def test_packed_rows_give_the_losses_of_rows_of_their_own():
    config = quiet(backbone={**toy.section()["backbone"], "experts": EXPERTS}, balance_delta=0.3)
    lay, model = toy.serializer(), toy.model(config)
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "b":
            value[...] = 0.1 * jax.random.normal(jax.random.key(1), value[...].shape)
    together = losses(config, toy.batch([[toy.chain(), other()]], lay), model)
    apart = losses(config, toy.batch([[toy.chain()], [other()]], lay), model)
    assert together["mask"][1] == 2 and together["balance"][1] == 2
    for name, (total, weight) in together.items():
        assert total == pytest.approx(apart[name][0], rel=1e-4), name
        assert weight == apart[name][1]


def test_another_picture_changes_only_what_comes_after_it():
    config = quiet()
    lay, model = toy.serializer(), toy.model(config)
    batch = toy.batch([[toy.chain()]], lay)

    def hidden(batch):
        tokens = batch["tokens"]
        visual, _ = model.look(batch["images"])
        x = model.embed_tokens(tokens["ids"], tokens["image"], tokens["slot"], visual)
        return model.backbone(x, tokens["positions"], model.sight(batch))[0]

    before = hidden(batch)
    pixels = batch["images"]["pixels"].at[0, 1].set(0)
    after = hidden({**batch, "images": {**batch["images"], "pixels": pixels}})
    begins = int(jnp.argmax(batch["tokens"]["image"][0] == 1))
    np.testing.assert_array_equal(before[0, :begins], after[0, :begins])
    assert np.abs(before - after)[0, begins:].max() > 1e-3


def test_masks_teach_what_asks_for_them_and_the_tower():
    config = quiet()
    lay = toy.serializer()
    batch, model = toy.batch([[toy.chain()], [other()]], lay), toy.model(config)

    def loss(model, batch):
        sums, _ = model.loss_sums(batch, jax.random.key(0))
        return sums["mask"] + sums["dice"]

    grads = dict(nnx.to_flat_state(nnx.grad(loss)(model, batch)))
    size = {path: float(jnp.abs(g[...]).max()) for path, g in grads.items()}
    assert size["masks", "query_in", "kernel"] > 0 and size["masks", "neck", "neck_in", "kernel"] > 0
    assert size["embed", "table"] > 0 and max(v for p, v in size.items() if p[0] == "tower") > 0
    assert not any(v for p, v in size.items() if p[0] == "head"), "words are not what masks teach"
    # The state before the mark is asked, so the mark's own embedding is not.
    seg = lay.ids["[SEG]"]
    assert not np.abs(grads["embed", "table"][seg]).max()


def test_masks_nobody_learns_are_not_counted():
    config = quiet()
    record = Conversation(
        "x", (toy.user(Image("a")), toy.bot(toy.region(), loss=False)), {"a": toy.picture()}
    )
    found = losses(config, toy.batch([[record], [toy.chain()]], toy.serializer()))
    assert found["mask"][1] == 1 and found["dice"][1] == 1


def test_published_sizes():
    """Of the parts whose counts are known: the mask decoder with its query, and the experts."""
    config = toy.FAMILY.config.ModelConfig()
    shapes = nnx.eval_shape(lambda: toy.FAMILY.model.build(config, nnx.Rngs(0)))
    size = {}
    for path, value in nnx.to_flat_state(nnx.state(shapes, nnx.Param)):
        part = path[1] if path[0] == "masks" else path[0]
        size[part] = size.get(part, 0) + int(np.prod(value.shape))
    assert size["decoder"] == 4_058_340 and size["prompts"] == 6_220
    assert size["query_in"] + size["query_out"] == 17_830_144
    assert size["adapter"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert size["backbone"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    # ViT-L/14 at 336 px without its last layer.
    layer = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert size["tower"] == 23 * layer + 3 * 14 * 14 * 1024 + 1024 + 577 * 1024 + 2 * 1024


def test_answers_of_reply_ids_ignore_pictures_between():
    lay = toy.serializer()
    ids = [
        *lay.text_ids("<image_gen>a ring</image_gen>", lay.dialect),
        *lay.block,
        *lay.tokenizer.encode("one"),
    ]
    found = lay.answer([*ids, lay.end])
    assert [type(s) for s in found.segments] == [grammar.Call, grammar.Text]


def test_boxes_without_a_picture_stay_words():
    from umm_jax.markup import records

    answer = grammar.parse("at <box>[0.1, 0.2, 0.3, 0.4]</box>", toy.serializer().dialect)
    assert records.parts(answer, None)[1] == Text("<box>[0.100, 0.200, 0.300, 0.400]</box>")
    assert records.parts(answer, "a")[1] == Box("a", (0.1, 0.2, 0.3, 0.4))


# --- a mask head with SAM's encoder -------------------------------------------------------------------------


def lisa(**changes):
    """As LISA has it: the mask head sees the picture itself, larger, through an encoder of its own."""
    masks = toy.section()["masks"]
    encoder = dict(image_size=32, patch=8, width=16, layers=2, heads=2, mlp=24, groups=1, window=2, out=16)
    layout = {**toy.section()["layout"], "large_size": 32, "mask_size": 16, "dialect": "lisa"}
    tower = toy.section()["tower"]
    tower = {**tower, "pyramid": {**tower["pyramid"], "noise": 0.0}}
    return toy.section(
        masks={**masks, "encoder": encoder}, layout=layout, tower=tower, constrain="off", **changes
    )


def test_a_picture_for_sam_lies_in_the_corner():
    lay = toy.FAMILY.stream.Serializer(lisa(), toy.tokenizer())
    wide = toy.picture(3, (8, 16))
    mask = toy.region(size=(8, 16), rows=slice(2, 6), columns=slice(8, 16))
    turns = (toy.user(Image("a"), "segment the red ring"), toy.bot(mask))
    stream = lay(Conversation("x", turns, {"a": wide}))
    assert stream["images"]["extent"].tolist() == [[16, 32]]
    large = stream["images"]["large"][0]
    assert large.shape == (32, 32, 3) and large[:16].any() and not large[16:].any()
    target = stream["masks"]["target"][0]
    assert target.shape == (16, 16) and not target[8:].any() and target[2:6, 8:].all() and target.sum() == 32
    back = lay.found(np.where(target > 0, 1.0, -1.0), 8, 16)
    np.testing.assert_array_equal(back, mask.array())


def test_what_is_beyond_the_picture_does_not_matter():
    config = from_dict(toy.FAMILY.config.ModelConfig, lisa(), "config.model")
    lay, model = toy.FAMILY.stream.Serializer(config, toy.tokenizer()), toy.model(config)
    turns = (
        toy.user(Image("a"), "segment the red ring"),
        toy.bot(toy.region(size=(8, 16), rows=slice(2, 6))),
    )
    batch = toy.batch([[Conversation("x", turns, {"a": toy.picture(3, (8, 16))})]], lay)
    found = losses(config, batch, model)
    assert found["mask"][1] == 1 and np.isfinite(found["mask"][0])
    images = batch["images"]
    other = {**batch, "images": {**images, "large": images["large"].at[:, :, 16:].set(99)}}
    assert losses(config, other, model) == found
    inside = {**batch, "images": {**images, "large": images["large"].at[:, :, :8].set(99)}}
    assert losses(config, inside, model)["mask"] != found["mask"]


def test_the_encoder_and_its_picture_go_together():
    with pytest.raises(ConfigError, match="large_size is 0, but masks.encoder sees 32"):
        toy.config(masks=lisa()["masks"])
    with pytest.raises(ConfigError, match="large_size is 64"):
        toy.config(layout={**toy.section()["layout"], "large_size": 64})
