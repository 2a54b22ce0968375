"""Every family offers what is asked of one, under the names and with the arguments of ``contract.py``."""

import inspect

import mm_interleaved_toy as toy
import pytest
import toy_family

from umm_jax import families
from umm_jax.families import contract


def missing(offered, protocol) -> list[str]:
    """The methods of `protocol` that `offered` (a class or module) lacks, or that cannot be called so."""
    found = []
    for base in (b for b in protocol.__mro__ if getattr(b, "_is_protocol", False)):
        for name, asked in vars(base).items():
            if not inspect.isfunction(asked) or (name.startswith("_") and name != "__call__"):
                continue
            method = getattr(offered, name, None)
            if method is None:
                found.append(name)
                continue
            parameters = list(inspect.signature(asked).parameters)
            parameters = parameters[1:] if inspect.ismodule(offered) else parameters
            try:
                inspect.signature(method).bind(*parameters)
                inspect.signature(method).bind(*parameters[:1], **dict.fromkeys(parameters[1:]))
            except TypeError as error:
                found.append(f"{name}: {error}")
    return found


@pytest.mark.parametrize("name", families.names())
def test_a_family_offers_what_is_asked_of_one(name):
    family = families.get(name)
    assert isinstance(family.config.ModelConfig.vocab, property)
    assert not missing(family.stream, contract.StreamPart)
    assert not missing(family.stream.Serializer, contract.Serializer)
    assert not missing(family.model, contract.ModelPart)
    made = inspect.signature(family.model.build).return_annotation
    draws = name != "unified_mllm"  # which has pictures made by experts
    assert not missing(made, contract.AutoencoderModel if draws else contract.Model)
    assert not missing(family.generate.Replier, contract.Replier)
    assert not missing(family.weights, contract.WeightsPart)
    assert family.weights.ARCHITECTURE and isinstance(family.weights.PARTS, tuple)


def test_what_the_family_makes_fits_too():
    config = toy.model_config()
    assert isinstance(config, contract.ModelConfig) and config.vocab == 40
    assert isinstance(toy.serializer(config), contract.Serializer)
    model = toy.model(config)
    assert isinstance(model, contract.AutoencoderModel)
    replier = families.get("mm_interleaved").generate.Replier(config, {}, toy.Words())
    assert isinstance(replier, contract.Replier)


def test_the_family_of_the_training_tests_is_one():
    assert not missing(toy_family.Model, contract.AutoencoderModel)


def test_the_check_can_fail():
    class Half:
        def __call__(self, conversation, tokens):
            return {}

    assert missing(Half, contract.Serializer) == ["__call__: missing a required argument: 'tokens'", "prompt"]
    assert not isinstance(Half(), contract.Serializer)

    class Renamed:
        def reply(self, conversations, settings=None, seed=None):
            return []

    assert [problem.split(":")[0] for problem in missing(Renamed, contract.Replier)] == ["reply"]
