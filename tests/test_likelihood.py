"""How probable given replies are: by hand, greedily, and alone or together."""

import chatumm_toy
import jax
import jax.numpy as jnp
import mm_interleaved_toy
import numpy as np
import pytest
import unified_toy
from flax import nnx

from umm_jax import families
from umm_jax.config import ReplySettings
from umm_jax.conversation import Conversation, Image, Text, Turn
from umm_jax.data.packing import batch, pack_row
from umm_jax.errors import DataError
from umm_jax.generate.likelihood import Likelihood


def toy(name):
    """(replier, conversation that waits for a reply) of a family with random weights."""
    if name == "chatumm":
        config = chatumm_toy.model_config()
        picture = chatumm_toy.picture(np.random.default_rng(0))
        return chatumm_toy.replier(config), conversation(picture)
    if name == "mm_interleaved":
        config, words = mm_interleaved_toy.model_config(), mm_interleaved_toy.Words()
        asked = mm_interleaved_toy.conversation(3).with_turn(Turn("user", (Text("make it blue"),)))
        return _replier(name, config, mm_interleaved_toy.model(config), words), asked
    config = unified_toy.config()
    made = _replier(name, config, unified_toy.model(config), unified_toy.tokenizer())
    return made, conversation(unified_toy.picture())


def _replier(name, config, model, tokenizer):
    return families.get(name).generate.Replier(config, nnx.to_pure_dict(nnx.split(model)[1]), tokenizer)


def conversation(picture):
    return Conversation("x", (Turn("user", (Image("a"), Text("what is it"))),), {"a": picture})


@pytest.fixture(scope="module", params=["mm_interleaved", "chatumm", "unified_mllm"])
def likely(request):
    replier, asked = toy(request.param)
    return Likelihood(request.param, replier, rows=4, round_tokens=16), asked


def test_each_option_has_its_own_whatever_stands_beside_it(likely):
    score, asked = likely
    options = ["red", "blue circle", "what is it", "red square", "red"]
    together = score(asked, options)
    assert together[0] == together[4] and len({one.logprob for one in together}) == 4
    for option, one in zip(options, together):
        (alone,) = score(asked, [option])
        assert alone.logprob == pytest.approx(one.logprob, abs=1e-4) and alone.logprob < 0


def test_an_answered_conversation_is_refused(likely):
    score, asked = likely
    with pytest.raises(DataError, match="ends with a user turn"):
        score(asked.with_turn(Turn("assistant", (Text("red"),))), ["blue"])


def test_by_hand_and_greedily():
    """The sum over a reply's pieces, its end among them, of log-softmax of what stands before each."""
    replier, asked = toy("mm_interleaved")
    score = Likelihood("mm_interleaved", replier, rows=4, round_tokens=16)
    config = mm_interleaved_toy.model_config()
    module = mm_interleaved_toy.model(config)
    serializer = mm_interleaved_toy.serializer(config)
    text = "red square"
    said = asked.with_turn(Turn("assistant", (Text(text),), loss=True))
    stream, before = serializer(said), len(serializer.prompt(asked)["tokens"]["ids"])
    row = pack_row([stream], serializer.spec, {"tokens": 96, "images": 6})
    whole = jax.tree.map(jnp.asarray, batch([row]))
    hidden = module.hidden(whole, *module.look(whole["images"]["pixels"]))[0]
    ids = stream["tokens"]["ids"]
    assert len(ids) - before == 3, "two words and the end of the turn"
    at = np.arange(before, len(ids))
    logits = jax.nn.log_softmax(module.head(hidden[at - 1]).astype(jnp.float32))
    (one,) = score(asked, [text])
    assert one.logprob == pytest.approx(float(logits[np.arange(3), ids[at]].sum()), abs=1e-4)
    assert one.greedy == bool((logits.argmax(-1) == ids[at]).all()) is False
    # A head that has each of the three as the most probable piece.
    wanted = np.zeros((3, logits.shape[-1]), np.float32)
    wanted[np.arange(3), ids[at]] = 9.0
    kernel = np.linalg.pinv(np.asarray(hidden[at - 1], np.float64)) @ wanted
    head = replier.params["head"]["base"]
    head = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros_like(head["bias"])}
    replier.params = {**replier.params, "head": {"base": head}}
    greedy, other = score(asked, [text, "blue"])
    assert greedy.greedy and not other.greedy and greedy.logprob > other.logprob


@pytest.mark.parametrize("name", ["mm_interleaved", "chatumm"])
def test_a_picture_that_is_not_a_number_is_an_error(name):
    replier, asked = toy(name)
    part = "unet" if name == "mm_interleaved" else "latent_out"
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), replier.params[part])
    settings = ReplySettings(mode="image", max_tokens=3, image_steps=1)
    assert replier.reply([asked], settings, [0])[0].images
    replier.params = {**replier.params, part: broken}
    with pytest.raises(DataError, match=f"{asked.id}: the picture that was drawn is not a number"):
        replier.reply([asked], settings, [0])
