"""Distances of features: Fréchet against scipy's root, kernel by hand, and the networks behind them."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from umm_jax.errors import ConfigError, DataError
from umm_jax.evaluate.measures import features
from umm_jax.evaluate.measures.frechet import Moments, frechet, kernel


def moments(x, parts=1, what="features"):
    found = Moments(what)
    for batch in np.array_split(np.asarray(x), parts):
        found.add(batch)
    return found


def drawn(seed, n, d, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift


# --- mean and covariance in batches -------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3, 50])
def test_batches_add_up_to_the_whole(parts):
    # Far from 0, where sums of squares lose their digits.
    x = drawn(0, 50, 5, shift=1e6)
    found = moments(x, parts)
    assert found.n == 50
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-7)


def test_merging_is_as_good_as_having_seen_all():
    x = drawn(1, 31, 4)
    one, other = moments(x[:10], 2), moments(x[10:], 3)
    one.merge(other).merge(Moments())
    whole = moments(x)
    assert one.n == 31 and other.n == 21, "the other is left as it was"
    np.testing.assert_allclose(one.covariance, whole.covariance, rtol=1e-12)
    into = Moments().merge(other)
    into.add(x[:10])
    np.testing.assert_allclose(into.covariance, whole.covariance, rtol=1e-12)
    np.testing.assert_allclose(other.covariance, np.cov(x[10:], rowvar=False), rtol=1e-12)


def test_half_precision_is_added_in_double():
    x = np.full((3000, 1), 100, np.float16)
    x[::2] += 1
    assert moments(x, 7).mean == pytest.approx(100.5, abs=1e-12)


def test_what_cannot_be_added():
    found = Moments("drawn pictures")
    with pytest.raises(DataError, match="two pictures or more, there are 0"):
        found.covariance  # noqa: B018
    found.add(np.zeros((0, 3))).add(np.ones((1, 3)))
    with pytest.raises(
        DataError, match="drawn pictures: a covariance needs two pictures or more, there are 1"
    ):
        found.covariance  # noqa: B018
    with pytest.raises(DataError, match="1 of 2 features hold NaN"):
        found.add(np.array([[0, 1, 2], [0, math.nan, 2]]))
    with pytest.raises(DataError, match="NaN or infinity"):
        found.add(np.array([[0, 1, math.inf]]))
    with pytest.raises(DataError, match="features of 4 numbers among ones of 3"):
        found.add(np.ones((2, 4)))
    with pytest.raises(DataError, match="must be .N, D."):
        found.add(np.ones(3))
    assert found.n == 1, "what was refused has left nothing behind"


# --- Fréchet ------------------------------------------------------------------------------------------


def test_frechet_by_hand():
    """Of one number: (m1 - m2)^2 + (s1 - s2)^2. Here means 1 and 6, variances 2 and 8."""
    a, b = np.array([[0.0], [2.0]]), np.array([[4.0], [8.0]])
    assert frechet(moments(a), moments(b)) == pytest.approx(25 + (math.sqrt(2) - math.sqrt(8)) ** 2)


@pytest.mark.parametrize("n, m, d", [(40, 60, 3), (200, 150, 30), (2, 50, 1)])
def test_frechet_against_scipys_root(n, m, d):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = drawn(2, n, d), drawn(3, m, d, shift=0.5)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = linalg.sqrtm(first @ second)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root.real)
    assert frechet(moments(a), moments(b)) == pytest.approx(expected, rel=1e-9)
    assert frechet(moments(b), moments(a)) == pytest.approx(expected, rel=1e-9)


def test_fewer_pictures_than_numbers():
    """Covariances of low rank, whose product has no good root by scipy. Moved by 3 in each number: 9 D."""
    x = drawn(4, 20, 300)
    assert frechet(moments(x), moments(x)) == 0
    assert frechet(moments(x), moments(x + 3)) == pytest.approx(9 * 300)
    # Features in spaces of their own share nothing: the root is 0.
    a, b = np.zeros((10, 40)), np.zeros((10, 40))
    a[:, :20], b[:, 20:] = drawn(5, 10, 20), drawn(6, 10, 20)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + a.var(0, ddof=1).sum() + b.var(0, ddof=1).sum()
    assert frechet(moments(a), moments(b)) == pytest.approx(expected)


def test_pictures_that_are_all_the_same():
    a = np.ones((5, 7))
    assert frechet(moments(a), moments(a)) == 0
    assert frechet(moments(a), moments(a * 3)) == pytest.approx(4 * 7)


def test_frechet_says_what_is_missing():
    with pytest.raises(DataError, match="true frames: .* there are 1"):
        frechet(moments(np.ones((3, 2))), moments(np.ones((1, 2)), what="true frames"))
    with pytest.raises(DataError, match="2 numbers, .* of 3"):
        frechet(moments(np.ones((3, 2))), moments(np.ones((3, 3))))


# --- kernel -------------------------------------------------------------------------------------------


def test_kernel_by_hand():
    """D = 1, k(x, y) = (x y + 1)^3. a: k(0, 1) = 1. b: k(1, 2) = 27. Across: 1, 1, 8, 27, mean 37 / 4."""
    assert kernel([[0.0], [1.0]], [[1.0], [2.0]]) == pytest.approx(1 + 27 - 2 * 37 / 4)


def test_kernel_is_the_packages_over_all(monkeypatch):
    """clean-fid's formula for one subset that is everything, in blocks or not."""
    a, b = drawn(7, 30, 6), drawn(8, 30, 6)
    own = (a @ a.T / 6 + 1) ** 3 + (b @ b.T / 6 + 1) ** 3
    across = (a @ b.T / 6 + 1) ** 3
    expected = ((own.sum() - np.trace(own)) / 29 - 2 * across.sum() / 30) / 30
    assert kernel(a, b) == pytest.approx(expected)
    monkeypatch.setattr("umm_jax.evaluate.measures.frechet._ROWS", 7)
    assert kernel(a, b) == pytest.approx(expected)


def test_kernel_says_what_is_missing():
    with pytest.raises(DataError, match="two rows or more"):
        kernel(np.ones((1, 3)), np.ones((5, 3)))
    with pytest.raises(DataError, match="two rows or more"):
        kernel(np.ones((4, 2)), np.ones((5, 3)))
    with pytest.raises(DataError, match="NaN"):
        kernel(np.full((4, 3), np.nan), np.ones((5, 3)))


# --- networks -----------------------------------------------------------------------------------------


def mean_colour(images):
    return [image.mean((0, 1)) for image in images]


@pytest.fixture(autouse=True)
def fresh():
    features.extractor.cache_clear()
    yield
    features.extractor.cache_clear()


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def test_a_function_of_yours():
    two = pictures((3, 4), (5, 2))
    found = features.of(f"{__name__}:mean_colour", two)
    assert found.dtype == np.float32 and found.shape == (2, 3)
    np.testing.assert_allclose(found, mean_colour(two), rtol=1e-6)


def test_networks_that_are_not_there(tmp_path):
    for name, complaint in (
        ("clip", "must be clean-fid:FOLDER, clip:FOLDER or module:function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        (f"{__name__}:nothing", "nothing"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            features.extractor(name)


@pytest.mark.parametrize("found", [np.ones(3), np.ones((1, 3)), np.full((2, 3), np.nan)])
def test_features_that_are_none(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "theirs", SimpleNamespace(f=lambda images: found))
    with pytest.raises(DataError, match=r"expected finite numbers \[2, D\]"):
        features.of("theirs:f", pictures((2, 2), (2, 2)))


def test_clean_fid_is_only_used_where_all_of_it_is_there(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    seen = []

    class Inception(torch.nn.Module):
        def __init__(self, folder, download):
            super().__init__()
            assert folder == str(tmp_path) and download is False

        def forward(self, x):
            seen.append(tuple(x.shape))
            return x.mean((2, 3))

    def build_resizer(mode):
        assert mode == "clean"
        return lambda image: np.full((299, 299, 3), image.mean(), np.float32)

    monkeypatch.setitem(sys.modules, "cleanfid", None)
    monkeypatch.setitem(sys.modules, "cleanfid.resize", None)
    with pytest.raises(ConfigError, match=r"need clean-fid: .*\[fid\]"):
        features.extractor(f"clean-fid:{tmp_path}")
    monkeypatch.setitem(sys.modules, "cleanfid", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "cleanfid.resize", SimpleNamespace(build_resizer=build_resizer))
    monkeypatch.setitem(
        sys.modules, "cleanfid.inception_torchscript", SimpleNamespace(InceptionV3W=Inception)
    )
    with pytest.raises(ConfigError, match="inception-2015-12-05.pt, the weights"):
        features.extractor(f"clean-fid:{tmp_path}")
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"")
    two = pictures((3, 4), (5, 2))
    found = features.of(f"clean-fid:{tmp_path}", two)
    np.testing.assert_allclose(found, [[i.mean()] * 3 for i in two], rtol=1e-4)
    assert seen == [(2, 3, 299, 299)]


def test_clip_by_its_own_processor(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match="has no config.json"):
        features.extractor(f"clip:{tmp_path}")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.CLIPConfig(
        text_config=small | {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=small | {"image_size": 16, "patch_size": 8},
        projection_dim=5,
    )
    network = transformers.CLIPModel(config).eval()
    network.save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    processor.save_pretrained(tmp_path)
    features.extractor.cache_clear()
    two = pictures((20, 30), (40, 16))
    found = features.of(f"clip:{tmp_path}", two)
    with torch.no_grad():
        pixels = processor(images=two, return_tensors="pt")["pixel_values"]
        expected = network.visual_projection(network.vision_model(pixels).pooler_output).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_middle_of_a_picture():
    image = np.zeros((4, 12, 3), np.uint8)
    image[:, 4:8] = 200
    assert (features.middle(image, 4) == 200).all(), "a third of it, and nothing was resized"
    assert features.middle(pictures((30, 20))[0], 8).shape == (8, 8, 3)
    assert features.middle(pictures((3, 3))[0], 8).shape == (8, 8, 3)


def test_cosines():
    a = np.array([[1.0, 0], [3, 4], [0, 0], [1, 1]])
    b = np.array([[5.0, 0], [4, 3], [1, 1], [-1, -1]])
    np.testing.assert_allclose(features.cosines(a, b), [1, 24 / 25, 0, -1])
