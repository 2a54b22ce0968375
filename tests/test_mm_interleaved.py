"""The assembled family: packing changes nothing, conversations stay apart, memory equals reading at once."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import mm_interleaved_toy as toy
import numpy as np
import pytest
from flax import nnx

from umm_jax import families
from umm_jax.config import ReplySettings
from umm_jax.conversation import Box, Conversation, TaskCall, Text, Turn
from umm_jax.data.packing import batch, pack_row
from umm_jax.data.tokenizer import Tokenizer
from umm_jax.errors import ConfigError, DataError
from umm_jax.families.mm_interleaved.generate import Replier
from umm_jax.families.mm_interleaved.stream import Serializer, control_pieces, fit
from umm_jax.families.mm_interleaved.stream import _most_images_of as most_images_of
from umm_jax.models.losses import cross_entropy


@pytest.fixture(scope="module")
def config():
    return toy.model_config()


@pytest.fixture(scope="module")
def model(config):
    return toy.model(config)


@pytest.fixture(scope="module")
def streams(config):
    put = toy.serializer(config)
    return [put(toy.conversation(0)), put(toy.conversation(1, upload=True)), put(toy.conversation(2, 1))]


def rows(config, groups, tokens=96, images=6):
    spec = toy.serializer(config).spec
    return jax.tree.map(
        jnp.asarray, batch([pack_row(group, spec, {"tokens": tokens, "images": images}) for group in groups])
    )


# --- the stream -------------------------------------------------------------------------------------


def test_the_stream_is_laid_out_as_documented(config):
    words, put = toy.Words(), toy.serializer(config)
    stream = put(toy.conversation(0, 1))
    tokens, images = stream["tokens"], stream["images"]
    names = [words.pieces[i] for i in tokens["ids"]]
    assert names == (
        [
            "<s>",
            "<user>",
            *"draw a red circle".split(),
            "<eot>",
            "<bot>",
            *"ok a blue square".split(),
            "<soi>",
        ]
        + ["<image>"] * toy.SLOTS
        + ["<eot>"]
    )
    assert tokens["weight"].tolist() == [0] * 8 + [1] * 5 + [0] * toy.SLOTS + [1]
    assert tokens["image"].tolist() == [-1] * 13 + [0] * toy.SLOTS + [-1]
    assert tokens["slot"][13 : 13 + toy.SLOTS].tolist() == list(range(toy.SLOTS))
    assert images["soi"].tolist() == [12] and images["draw"].tolist() == [1.0]


def test_a_users_image_is_neither_a_target_nor_drawn(config):
    stream = toy.serializer(config)(toy.conversation(1, upload=True))
    first = stream["images"]["soi"][0]
    assert stream["tokens"]["weight"][first] == 0
    assert stream["images"]["draw"].tolist() == [0.0, 1.0]


def test_boxes_are_written_and_read_back(config):
    put = toy.serializer(config)
    box = Box("i0", (0.125, 0.25, 0.5, 1.0))
    turns = (
        *toy.conversation(0, 1).turns,
        Turn("user", (Text("what"),)),
        Turn("assistant", (Text("it"), box)),
    )
    stream = put(Conversation("b", turns, toy.conversation(0, 1).images))
    ids = stream["tokens"]["ids"][-8:-1]  # it <box> four bins </box>, before the end of the turn
    assert put.parts(ids, "i0") == [Text("it"), box]
    broken = [*ids[:3], ids[2], *ids[3:]]
    assert not any(isinstance(p, Box) for p in put.parts(broken, "i0"))


@pytest.mark.parametrize("tags", [[], ["<box>", "</box>"]], ids=["letters", "pieces"])
def test_boxes_in_text_are_written_and_read_back(tmp_path, tags):
    control = ["<user>", "<bot>", "<eot>", "<soi>", "<image>", *tags]
    tokenizer = Tokenizer.train(["it is left of a red circle"], tmp_path / "t.model", control, 512)
    layout = toy.model_section()["layout"] | {"box_format": "text"}
    put = Serializer({"layout": layout}, tokenizer)
    box = Box("i0", (0.057, 0.25, 0.4999, 1.0))
    said = (Text("it is"), box, Text("left of a red circle"), box)
    turns = (*toy.conversation(0, 1).turns, Turn("user", (Text("it"),)), Turn("assistant", said))

    def answer(turns):
        ids = put(Conversation("b", turns, toy.conversation(0, 1).images))["tokens"]["ids"].tolist()
        start = len(ids) - ids[::-1].index(tokenizer.id("<bot>"))
        return ids[start:-1]

    ids = answer(turns)
    assert ids.count(tokenizer.id("<box>") if tags else -1) == len(tags)
    parts = put.parts(ids, "i0")
    assert [p.kind for p in parts] == ["text", "box", "text", "box"]
    assert (parts[0], parts[2]) == (said[0], said[2])
    np.testing.assert_allclose(parts[1].xyxy, box.xyxy, atol=1e-3)
    # Written again it is the same text; without an image to be about, or malformed, it stays text.
    assert answer((*turns[:-1], Turn("assistant", tuple(parts)))) == ids
    for other in (put.parts(ids, None), put.parts(ids[: len(ids) // 2 - 2], "i0")):
        assert [p.kind for p in other] == ["text"] and "<box>(057,250)" in other[0].text


def test_the_stream_says_which_control_pieces_it_needs(config):
    assert control_pieces(config) == toy.CONTROL
    words = {"system": "", "user": "user: ", "assistant": "bot: "}
    plain = {"layout": {"box_format": "text", "prefixes": words}}
    assert control_pieces(plain) == ["<eot>", "<soi>", "<image>"]


def test_what_the_family_cannot_say_is_refused_by_name(config):
    turns = (Turn("user", (Text("draw"),)), Turn("assistant", (TaskCall("t2i", {}),), loss=True))
    with pytest.raises(DataError, match="record x, turn 1.*task calls"):
        toy.serializer(config)(Conversation("x", turns, {}))


def test_a_tokenizer_with_another_soi_is_refused():
    config = toy.model_config(layout=dict(toy.model_section()["layout"], soi_id=9))
    with pytest.raises(ConfigError, match="soi_id.*set it to 7"):
        toy.serializer(config)


def test_images_of_other_sizes_are_fitted():
    wide = np.zeros((40, 100, 3), np.uint8)
    wide[:, 20:80] = 255  # the filter reads a little beyond the crop
    out = fit(wide, 8)
    assert out.shape == (8, 8, 3) and out.min() == 255


# --- packing ----------------------------------------------------------------------------------------


def text_loss(model, data):
    visual, maps = model.look(data["images"]["pixels"])
    hidden = model.hidden(data, visual, maps)
    tokens = data["tokens"]
    ids, weight = jnp.roll(tokens["ids"], -1, 1), jnp.roll(tokens["weight"], -1, 1)
    return hidden, cross_entropy(hidden, model.head, ids, weight)[0]


def test_packed_and_unpacked_rows_give_equal_losses_and_gradients(config, model, streams):
    graphdef, state = nnx.split(model)
    params = nnx.to_pure_dict(state)

    def losses(params, data):
        model = nnx.merge(graphdef, nnx.State(params))
        weights = model.loss_weights(data)
        _, text = text_loss(model, data)
        visual, maps = model.look(data["images"]["pixels"])
        hidden = model.hidden(data, visual, maps)
        # The image part with the same time and noise for each image, wherever packing put it.
        image = image_loss(model, data, hidden, maps)
        return text / weights["text"] + image / weights["image"], weights

    def image_loss(model, data, hidden, maps):
        drawn = model.drawn(data)
        inputs = model.decoder_inputs(drawn, hidden, maps)
        target = drawn["target"]
        x0 = model.autoencoder.encode(target.reshape(-1, *target.shape[2:]) / 127.5 - 1)
        noised = model.schedule.at(x0, jnp.sin(1000 * x0), jnp.full(len(x0), 0.5))
        out = model.predict(noised.x_t, noised.t, *inputs)
        error = jnp.mean((out - noised.target) ** 2, -1, keepdims=True)
        return jnp.sum(model._image_weights(drawn) * error)

    grad = jax.jit(jax.value_and_grad(losses, has_aux=True))
    align = {"tokens": 8, "images": 1}
    apart_in_row = [pack_row(streams, toy.serializer(config).spec, {"tokens": 104, "images": 7}, align)]
    aligned = jax.tree.map(jnp.asarray, batch(apart_in_row))
    (apart, apart_weights), apart_grads = grad(params, rows(config, [[s] for s in streams], 40, 3))
    scale = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(apart_grads))
    for data in (rows(config, [streams]), aligned):
        (packed, weights), packed_grads = grad(params, data)
        np.testing.assert_allclose(weights["text"], apart_weights["text"])
        np.testing.assert_allclose(weights["image"], apart_weights["image"], rtol=1e-6)
        np.testing.assert_allclose(packed, apart, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(apart_grads), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * scale)


def test_images_that_are_only_shown_need_no_decoder(config, streams):
    """With max_drawn the decoder gets the drawn images alone; where they are more, the last ones."""
    data = rows(config, [streams])
    drawn_at = np.flatnonzero(np.asarray(data["images"]["draw"][0]))
    assert 1 < len(drawn_at) < data["images"]["draw"].shape[1]

    def inputs(most):
        model = toy.model(replace(config, max_drawn=most))
        drawn = model.drawn(data)
        visual, maps = model.look(data["images"]["pixels"])
        given = model.decoder_inputs(drawn, model.hidden(data, visual, maps), maps)
        return (model._image_weights(drawn), *given)

    every = inputs(None)
    for most in (len(drawn_at), len(drawn_at) - 1):
        kept = drawn_at[-most:]
        for few, all_ in zip(jax.tree.leaves(inputs(most)), jax.tree.leaves(every), strict=True):
            np.testing.assert_allclose(few, all_[kept], atol=1e-6)
    lost = [i for i in range(len(every[0])) if i not in drawn_at]
    assert not np.asarray(every[0])[lost].any()


def test_the_decoder_may_look_at_all_earlier_images_of_its_conversation(config, streams):
    """With decoder_images="visible" a drawing depends on every earlier image of its conversation."""
    put = toy.serializer(config)
    data = rows(config, [[put(toy.conversation(3, 3)), streams[0]]], tokens=96)
    images = data["images"]
    assert np.asarray(images["segment_ids"])[0].tolist() == [1, 1, 1, 2, 2, 0]

    def responds(kind):
        """[I, I]: whether drawing image i changes with the maps of image j, all else being equal."""
        model = toy.model(replace(config, decoder_images=kind))

        @jax.jit
        def predict(changed):
            visual, maps = model.look(images["pixels"])
            hidden = model.hidden(data, visual, maps)
            # Turned upside down: scaling would be undone by the norm that the synchronizer begins with.
            maps = tuple(
                jnp.where((jnp.arange(6) == changed)[:, None, None, None], m[:, :, ::-1], m) for m in maps
            )
            inputs = model.decoder_inputs(model.drawn(data), hidden, maps)
            x = jnp.ones((len(inputs[0]), toy.SIDE, toy.SIDE, 3))
            return model.predict(x, jnp.full(len(x), 0.7), *inputs)

        whole = predict(-1)
        moved = [predict(j) for j in range(6)]
        return np.array([[np.abs(m[i] - whole[i]).max() > 1e-6 for m in moved] for i in range(6)])

    previous, visible = np.zeros((6, 6), bool), np.zeros((6, 6), bool)
    previous[1, 0] = previous[2, 1] = previous[4, 3] = True
    visible[1, 0] = visible[2, 0] = visible[2, 1] = visible[4, 3] = True
    np.testing.assert_array_equal(responds("previous"), previous)
    np.testing.assert_array_equal(responds("visible"), visible)


def test_compat_release_reads_across_conversations_and_averages_over_all_images(config, streams):
    release = replace(config, compat="release", image_loss=None)
    ours, theirs = toy.model(replace(config, image_loss=None)), toy.model(release)
    data = rows(config, [streams])
    segments = np.asarray(data["tokens"]["segment_ids"])[0]

    def states(model):
        visual, maps = model.look(data["images"]["pixels"])
        return np.asarray(model.hidden(data, visual, maps))[0]

    np.testing.assert_allclose(states(ours)[segments == 1], states(theirs)[segments == 1], atol=1e-5)
    assert np.abs(states(ours) - states(theirs))[segments == 2].max() > 1e-3
    pixels = toy.SIDE**2
    assert float(ours.loss_weights(data)["image"]) == pixels * float(data["images"]["draw"].sum())
    assert float(theirs.loss_weights(data)["image"]) == pixels * int(
        (data["images"]["segment_ids"] > 0).sum()
    )


def test_an_image_that_opens_a_document_is_no_target(config):
    config = replace(config, image_loss=None)
    release = replace(config, compat="release")
    stream = {
        "tokens": dict(
            ids=np.array([1, 7, 8, 8, 8, 8, 12, 7, 8, 8, 8, 8], np.int32),
            weight=np.ones(12, np.float32),
            image=np.array([-1, -1, 0, 0, 0, 0, -1, -1, 1, 1, 1, 1], np.int32),
            slot=np.array([0, 0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 3], np.int32),
        ),
        "images": dict(
            pixels=np.zeros((2, toy.SIDE, toy.SIDE, 3), np.uint8),
            soi=np.array([1, 7], np.int32),
            draw=np.ones(2, np.float32),
        ),
    }
    data = rows(config, [[stream]], 16, 3)
    drawn = toy.model(config).drawn(data)
    assert np.asarray(drawn["draw"])[0].tolist() == [0.0, 1.0, 0.0]
    only = toy.model(replace(config, max_drawn=1)).drawn(data)
    assert (np.asarray(only["index"])[0].tolist(), np.asarray(only["draw"])[0].tolist()) == ([1], [1.0])
    # It is left out of the mean; the release counts it there as a zero.
    counts = [float(toy.model(c).loss_weights(data)["image"]) for c in (config, release)]
    assert counts == [toy.SIDE**2, 2 * toy.SIDE**2]


def test_more_images_than_the_tables_hold_are_refused_by_record(config):
    long = toy.conversation(0, exchanges=8)
    with pytest.raises(DataError, match="record toy-0: 8 images, and this model looks back at 7 at most"):
        toy.serializer(config)(long)
    visible = replace(config, decoder_images="visible")
    assert (config.most_images, visible.most_images) == (7, 4)
    assert most_images_of(toy.model_section()) == 7
    assert most_images_of(toy.model_section(decoder_images="visible")) == 4
    release = families.get("mm_interleaved").config.ModelConfig()
    assert most_images_of({}) == release.most_images == 49
    assert (
        most_images_of({"decoder_images": "visible"})
        == replace(release, decoder_images="visible").most_images
    )


def test_more_noise_draws_are_a_steadier_estimate_of_the_same_loss(config, streams):
    data = rows(config, [streams])

    def losses(draws):
        model = toy.model(replace(config, noise_draws=draws))
        loss = jax.jit(lambda key: model.loss_sums(data, key)[0]["image"])
        return np.array([float(loss(jax.random.key(k))) for k in range(24)])

    one, eight = losses(1), losses(8)
    assert eight.std() < 0.6 * one.std()
    assert abs(eight.mean() - one.mean()) < 3 * (one.std() + eight.std()) / len(one) ** 0.5


def test_images_drawn_in_turns_give_the_loss_and_gradients_of_all_at_once(streams):
    config = toy.model_config(noise_draws=2, decoder_images="visible")
    data = rows(config, [streams, streams[1:]])

    def learned(chunk):
        model = toy.model(replace(config, draw_chunk=chunk))
        graphdef, params = nnx.split(model)
        # Not where a fresh decoder starts, whose last layer of zeros hides every gradient before it.
        keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(params))))
        moved = jax.tree.map(lambda p: p + 0.05 * jax.random.normal(next(keys), p.shape, p.dtype), params)

        def loss(params):
            sums, _ = nnx.merge(graphdef, params).loss_sums(data, jax.random.key(2))
            return sums["text"] + 3 * sums["image"], sums

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(moved)

    (whole, sums), gradients = learned(None)
    (total, own), found = learned(2)
    np.testing.assert_allclose(own["image"], sums["image"], rtol=1e-5)
    np.testing.assert_allclose(total, whole, rtol=1e-5)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(gradients), strict=True):
        close = 1e-4 * np.abs(other).max() + 1e-7
        np.testing.assert_allclose(one, other, atol=close, err_msg=jax.tree_util.keystr(path))
    with pytest.raises(ConfigError, match="draw_chunk is 4, which does not divide the 6 images"):
        learned(4)


def test_images_in_turns_take_no_gradients_of_what_is_frozen(streams):
    config = toy.model_config(draw_chunk=2)
    graphdef, params = nnx.split(toy.model(config))
    data = rows(config, [streams])
    trained, frozen = nnx.to_pure_dict(params), {}
    frozen["unet"] = trained.pop("unet")

    def products(*of):
        def loss(trained, frozen):
            state = nnx.State({**trained, **frozen})
            return nnx.merge(graphdef, state).loss_sums(data, jax.random.key(2))[0]["image"]

        return str(jax.make_jaxpr(jax.grad(loss, argnums=of))(trained, frozen)).count("conv_general_dilated")

    assert products(0) < products(0, 1)


def test_changing_one_packed_conversation_leaves_the_others_bit_identical(config, model, streams):
    put = toy.serializer(config)
    other = put(toy.conversation(7, upload=True))
    assert len(other["tokens"]["ids"]) == len(streams[1]["tokens"]["ids"])

    @jax.jit
    def run(data):
        hidden, _ = text_loss(model, data)
        _, maps = model.look(data["images"]["pixels"])
        inputs = model.decoder_inputs(model.drawn(data), hidden, maps)
        x = jnp.ones((len(inputs[0]), toy.SIDE, toy.SIDE, 3))
        return hidden, model.predict(x, jnp.full(len(x), 0.7), *inputs)

    data = rows(config, [streams])
    hidden, drawn = run(data)
    changed, redrawn = run(rows(config, [[streams[0], other, streams[2]]]))
    segments, of_images = data["tokens"]["segment_ids"][0], data["images"]["segment_ids"][0]
    keep, keep_images = (
        np.asarray((segments == 1) | (segments == 3)),
        np.asarray((of_images == 1) | (of_images == 3)),
    )
    assert (np.asarray(hidden[0])[keep] == np.asarray(changed[0])[keep]).all()
    assert (np.asarray(drawn)[keep_images] == np.asarray(redrawn)[keep_images]).all()
    assert not np.array_equal(np.asarray(hidden[0])[segments == 2], np.asarray(changed[0])[segments == 2])


def test_later_tokens_and_images_do_not_reach_earlier_ones(config, model, streams):
    data = rows(config, [[streams[0]]])
    last = int(data["images"]["soi"][0, 1])
    before, _ = jax.jit(text_loss)(model, data)
    pixels = data["images"]["pixels"].at[0, 1].set(255 - data["images"]["pixels"][0, 1])
    data = {"tokens": data["tokens"], "images": {**data["images"], "pixels": pixels}}
    after, _ = jax.jit(text_loss)(model, data)
    assert (np.asarray(before)[0, : last + 1] == np.asarray(after)[0, : last + 1]).all()
    assert not np.array_equal(np.asarray(before)[0, last + 1], np.asarray(after)[0, last + 1])


def test_layers_written_out_give_what_layers_looped_over_give(config, model, streams):
    data = rows(config, [[streams[0], streams[1]]])
    backbone = replace(config.backbone, unroll=True)
    written_out = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: toy.model(replace(config, backbone=backbone)))), nnx.state(model)
    )
    hidden = jax.jit(lambda m, d: m.hidden(d, *m.look(d["images"]["pixels"])))
    np.testing.assert_allclose(hidden(written_out, data), hidden(model, data), rtol=1e-5, atol=1e-5)
    programs = (str(jax.make_jaxpr(hidden)(m, data)) for m in (model, written_out))
    looped, flat = (len(re.findall(r"unroll=1\b", text)) for text in programs)
    assert flat < looped


@pytest.mark.slow
def test_put_together_as_the_release_it_learns_and_draws_with_guidance(streams):
    config = toy.model_config(**toy.latent_section())
    model = toy.model(config)
    graphdef, params = nnx.split(model)
    data = rows(config, [streams])

    def loss(params):
        # A key that leaves out the condition of some of the images, not of all.
        return nnx.merge(graphdef, params).loss_sums(data, jax.random.key(2))[0]["image"]

    gradient = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    for part in ("null_condition", "context_resampler", "unet", "unet_sync", "backbone", "tower"):
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient[part])), part
        assert max(np.abs(g).max() for g in jax.tree.leaves(gradient[part])) > 0, part
    # The decoder's targets are the autoencoder's latents, which must not move towards what is easy to draw.
    assert not any(np.any(g) for g in jax.tree.leaves(gradient["autoencoder"]))

    replier = Replier(config, nnx.to_pure_dict(params), toy.Words(), round_tokens=16)
    drawn = []
    for guidance in (1.0, 3.0):
        settings = ReplySettings(mode="image", max_tokens=2, max_images=1, image_steps=3, guidance=guidance)
        asked = toy.conversation(3).with_turn(Turn("user", (Text("make it blue"),)))
        (image,) = replier.reply([asked], settings, [5])[0].images.values()
        drawn.append(image.array())
    assert drawn[0].shape == (toy.SIDE, toy.SIDE, 3) and not np.array_equal(*drawn)


def test_the_context_resamplers_dropout_acts_in_training(streams):
    data = rows(toy.model_config(), [streams])

    def losses(rate):
        resampler = toy.latent_section()["context_resampler"] | {"dropout": rate}
        model = toy.model(toy.model_config(context_resampler=resampler))
        return jax.jit(lambda key: model.loss_sums(data, key)[0])(jax.random.key(1))

    without, dropped = losses(0.0), losses(0.5)
    # Nothing else is drawn differently: the text, and the noise of tower and decoder, stay as they were.
    assert without["text"] == dropped["text"]
    assert abs(without["image"] - dropped["image"]) > 1e-3 * without["image"]


@pytest.mark.parametrize(
    "section, field, value, said",
    [
        ("layout", "image_tokens", 9, "layout.image_tokens is 9, but tokens of an image: 4"),
        ("visual_resampler", "d_in", 12, "visual_resampler.d_in is 12, but the tower's width: 8"),
        ("unet", "side", 12, "unet.side is 12, but the side of the latents: 8"),
        ("unet", "context_width", 8, "context_resampler.d_out: 16"),
        ("unet_sync", "sides", [4, 1], "sides of the tower's maps: "),
        ("unet_sync", "d_maps", 12, "width of the tower's maps: 8"),
        ("backbone", "width", 32, "context_resampler.d_in is 16, but backbone.width: 32"),
        ("image_loss", "block", 3, "image_loss.block 3 must divide target_size 8"),
        ("schedule", "guidance", 2.0, "uncond_prob > 0"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(section, field, value, said):
    changed = toy.model_section()[section] | {field: value}
    with pytest.raises(ConfigError, match=said):
        toy.model_config(**{section: changed})
