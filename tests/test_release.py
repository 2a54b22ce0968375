"""The release: built abstractly at its real size, it has its parts and its parameters are all split."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from umm_jax import families, sharding


class Mesh64:
    """64 chips, as :func:`sharding.param_spec` sees them."""

    shape = {"data": 1, "fsdp": 16, "tensor": 4}


@pytest.fixture(scope="module")
def parameters():
    """{path: (shape, logical axes)} of the default configuration, MM-Interleaved 13B."""
    family = families.get("mm_interleaved")
    model = nnx.eval_shape(lambda: family.model.build(family.config.ModelConfig(), nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.split(model)[1])
    return {"/".join(map(str, path)): (v.shape, v.get_metadata("axes")) for path, v in flat}


def count(parameters, prefix=""):
    return sum(int(np.prod(shape)) for path, (shape, _) in parameters.items() if path.startswith(prefix))


def test_the_parts_have_the_published_sizes(parameters):
    """Counts of spec mm_interleaved section 11, without its tables and buffers."""
    assert count(parameters, "unet/") == 865_910_724
    assert count(parameters, "autoencoder/") == 83_653_863
    llama = 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120
    synchronizers = count(parameters, "backbone/syncs/")
    assert count(parameters, "backbone/") == llama + synchronizers
    assert 355e6 < synchronizers < 370e6
    assert count(parameters, "head/") == 32002 * 5120 + 32002 + 2 * 5120 + 2
    assert 14.8e9 < count(parameters) < 14.95e9


def test_no_parameter_above_a_megabyte_is_whole_on_every_device(parameters):
    whole = [
        path
        for path, (shape, axes) in parameters.items()
        if 4 * np.prod(shape) > 2**20 and sharding.param_spec(axes, shape, 4, Mesh64) == P(*[None] * len(shape))
    ]
    assert not whole


def test_a_device_holds_little_more_than_its_share(parameters):
    def share(shape, axes):
        ways = 1
        for names in sharding.param_spec(axes, shape, 4, Mesh64):
            for name in (names,) if isinstance(names, str) else names or ():
                ways *= Mesh64.shape[name]
        return np.prod(shape) / ways

    held = sum(share(shape, axes) for shape, axes in parameters.values())
    assert held < 1.25 * count(parameters) / 64


def test_every_path_is_made_of_strings(parameters):
    assert all(isinstance(key, str) for path in parameters for key in path.split("/"))
    assert len(jax.tree.leaves(list(parameters))) == len(parameters)
