"""Position tables and resizing: against their formulas, against a dense resize, and the released buffers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import fixture

from umm_jax.models.positions import GridVectors, pixel_centres, sincos_1d, sincos_2d
from umm_jax.models.resize import resize, resize_matrix


def test_sincos_1d():
    table = sincos_1d(5, 8)
    for p, k in np.ndindex(5, 4):
        angle = p * 10000 ** (-k / 4)
        np.testing.assert_allclose(table[p, [k, 4 + k]], [np.sin(angle), np.cos(angle)], atol=1e-6)
    with pytest.raises(ValueError, match="even"):
        sincos_1d(5, 7)


def test_sincos_2d_has_the_row_first():
    table = np.asarray(sincos_2d((3, 4), 8))
    assert table.shape == (3, 4, 8)
    np.testing.assert_array_equal(table[..., :4], np.broadcast_to(sincos_1d(3, 4)[:, None], (3, 4, 4)))
    np.testing.assert_array_equal(table[..., 4:], np.broadcast_to(sincos_1d(4, 4)[None], (3, 4, 4)))
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d((3, 4), 6)


@pytest.mark.parametrize("size", [(8, 5), (2, 3), (4, 4)])
def test_resizing_each_axis_of_the_table_is_resizing_the_table(size):
    whole = resize(sincos_2d((4, 4), 8), size, "bicubic")
    np.testing.assert_allclose(sincos_2d((4, 4), 8, size=size), whole, atol=1e-6)


def test_released_position_buffers():
    state = fixture("model")
    token = state["visual_tokenizer.pos_embed"]
    np.testing.assert_array_equal(token[0], 0)
    np.testing.assert_allclose(token[1:].reshape(16, 16, -1), sincos_2d((16, 16), 32), atol=1e-6)
    decoder = state["image_decoder.decoder.mmfs_module.mmfs_down_blocks.4.pos_embed"]
    np.testing.assert_allclose(decoder.reshape(16, 16, -1), sincos_2d((16, 16), 32), atol=1e-6)


def test_bilinear_matrices_by_hand():
    np.testing.assert_allclose(resize_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(resize_matrix(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    # No antialiasing: every output reads two pixels however much the map shrinks.
    np.testing.assert_array_equal((resize_matrix(16, 2) != 0).sum(1), 2)


def test_bicubic_matrix_by_hand():
    # Halving reads at distances 1.5, 0.5, 0.5, 1.5: Keys' cubic with a = -3/4 gives -3/32 and 19/32.
    far, near = -3 / 32, 19 / 32
    matrix = resize_matrix(8, 4, "bicubic")
    np.testing.assert_allclose(matrix[1], [0, far, near, near, far, 0, 0, 0])
    np.testing.assert_allclose(matrix[0], [far + near, near, far, 0, 0, 0, 0, 0])  # the border repeats
    for source, target in ((16, 8), (16, 64), (5, 7)):
        np.testing.assert_allclose(resize_matrix(source, target, "bicubic").sum(1), 1)


def test_resize_of_a_map():
    x = jnp.arange(2 * 4 * 6 * 3.0).reshape(2, 4, 6, 3)
    halved = x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(resize(x, (2, 3)), halved, rtol=1e-6)
    assert resize(x, (4, 6)) is x
    with pytest.raises(ValueError, match="'nearest' is unknown"):
        resize(x, (2, 3), "nearest")
    with pytest.raises(ValueError, match="side of 4 to 0"):
        resize(x, (0, 3))


def test_grid_vectors_and_centres():
    grid = GridVectors((2, 3), 4, std=0.7, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(grid()[1, 2], grid.rows[...][1] + grid.columns[...][2])
    np.testing.assert_allclose(pixel_centres(1, 2), [[0.25, 0.5], [0.75, 0.5]])
