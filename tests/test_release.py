"""The release, built abstractly at its real size, has the parts that docs/mm_interleaved.md counts."""

import numpy as np
import pytest
from flax import nnx

from umm_jax import families
from umm_jax.models.layers import Keys


@pytest.fixture(scope="module")
def parameters():
    """{path: (shape, logical axes)} of the default configuration, MM-Interleaved 13B."""
    family = families.get("mm_interleaved")
    model = nnx.eval_shape(lambda: family.model.build(family.config.ModelConfig(), Keys(0)))
    flat = nnx.to_flat_state(nnx.split(model)[1])
    return {"/".join(map(str, path)): (v.shape, v.get_metadata("axes")) for path, v in flat}


def count(parameters, prefix=""):
    return sum(int(np.prod(shape)) for path, (shape, _) in parameters.items() if path.startswith(prefix))


def test_the_parts_have_the_published_sizes(parameters):
    """Counts of docs/mm_interleaved.md section 10, without the release's fixed tables and buffers."""
    assert count(parameters, "unet/") == 865_910_724
    assert count(parameters, "autoencoder/") == 83_653_863
    llama = 40 * (4 * 5120**2 + 3 * 5120 * 13824 + 2 * 5120) + 5120
    synchronizers = count(parameters, "backbone/syncs/")
    assert count(parameters, "backbone/") == llama + synchronizers
    assert 355e6 < synchronizers < 370e6
    assert count(parameters, "head/") == 32002 * 5120 + 32002 + 2 * 5120 + 2
    assert 14.8e9 < count(parameters) < 14.95e9


def test_every_path_is_made_of_strings(parameters):
    assert all(isinstance(key, str) for path in parameters for key in path.split("/"))
