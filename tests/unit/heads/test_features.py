import numpy as np
import pytest
import torch

from hilum.backbones.vit import VisionTransformer, ViTConfig
from hilum.core.errors import ConfigError
from hilum.core.seeding import forked
from hilum.data.store import Store, write_arrays
from hilum.data.transforms import evaluation_crop, preprocessing
from hilum.heads import features as module
from hilum.heads.compact import Kept, fit_reduction
from hilum.heads.features import Augmentation, FeatureSource, extract, freeze, read_ahead

RECIPE = preprocessing("hilum-grey-1")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (20 + n, 30 - n), np.uint8) for n in range(8)]
    return write_arrays(tmp_path_factory.mktemp("features") / "store", images, np.zeros((8, 1), np.int8), ["Mass"])


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    with forked(0, "test"):
        return freeze(VisionTransformer(ViTConfig(8, 3, 2, patch_size=8, image_size=16, registers=2, layer_scale=0.5)))


def make(store: Store, backbone: VisionTransformer, **options) -> FeatureSource:
    settings = {"resolution": 16, "blocks": 2, "patches": True, "augmentation": Augmentation(), "seed": 4, "workers": 1}
    return FeatureSource(store, np.arange(8), backbone, RECIPE, **(settings | options))


def collect(batches) -> dict[int, torch.Tensor]:
    return {int(i): row for indices, found in batches for i, row in zip(indices, found.patches, strict=True)}


def in_batches(order, size: int) -> list[np.ndarray]:
    return [np.array(order[start : start + size]) for start in range(0, len(order), size)]


def test_features_are_the_last_blocks_concatenated(backbone: VisionTransformer) -> None:
    images = torch.randint(0, 256, (3, 1, 16, 24), dtype=torch.uint8)
    found = extract(backbone, images, RECIPE, 2, True)
    tokens = backbone.intermediate((images.float() / 255 - 0.5) / 0.25, 3)
    assert found.cls.shape == (3, 16)
    assert found.patches.shape == (3, 6, 16)
    assert found.grid == (2, 3)
    for place, block in enumerate(tokens[1:]):
        part = slice(8 * place, 8 * place + 8)
        assert torch.allclose(found.cls[:, part], block.cls, atol=1e-5)
        assert torch.allclose(found.patches[:, :, part], block.patches, atol=1e-5)
    assert torch.allclose(found.patch_mean, tokens[-1].patches.mean(dim=1), atol=1e-5)
    assert extract(backbone, images, RECIPE, 1, False).patches is None


def test_no_gradient_and_float32_also_under_bf16(backbone: VisionTransformer) -> None:
    images = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    exact, rounded = (extract(backbone, images, RECIPE, 2, True, precision) for precision in ("fp32", "bf16"))
    for tensor in (*exact[:3], *rounded[:3]):
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
    difference = (exact.cls - rounded.cls).abs().max()
    assert 0 < difference < 0.1


def test_a_view_depends_on_the_image_and_its_number_alone(store: Store, backbone: VisionTransformer) -> None:
    first = collect(make(store, backbone).training(3, in_batches(list(range(8)), 3)))
    second = collect(make(store, backbone, workers=3).training(3, in_batches([5, 2, 7, 0], 2)))
    for index, row in second.items():
        assert torch.allclose(row, first[index], atol=1e-5)
    other_view = collect(make(store, backbone).training(4, in_batches(list(range(8)), 8)))
    other_seed = collect(make(store, backbone, seed=5).training(3, in_batches(list(range(8)), 8)))
    for other in (other_view, other_seed):
        assert (other[0] - first[0]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_cache_gives_what_computing_gives_and_reads_each_view_once(
    store: Store, backbone: VisionTransformer, monkeypatch, dtype: str
) -> None:
    reads = []
    original = FeatureSource.pixels
    monkeypatch.setattr(FeatureSource, "pixels", lambda self, i, v: (reads.append((i, v)), original(self, i, v))[1])
    cached, fresh = make(store, backbone, cached_views=2, cache_dtype=dtype), make(store, backbone)
    expected = [collect(fresh.training(view, in_batches(list(range(8)), 8))) for view in (0, 1)]
    expected_crop = collect(fresh.evaluation(in_batches(list(range(8)), 8)))
    reads.clear()
    list(cached.training(0, in_batches([1, 6], 2)))  # a part of the images, as in the search
    for epoch in range(5):
        order = np.random.default_rng(epoch).permutation(8).tolist()
        found = collect(cached.training(epoch, in_batches(order, 3)))
        assert sorted(found) == list(range(8))
        for index, row in found.items():
            assert torch.allclose(row, expected[epoch % 2][index], atol=1e-5 if dtype == "float32" else 5e-3)
        crop = collect(cached.evaluation(in_batches(order[:4], 3)))
        for index, row in crop.items():
            assert torch.allclose(row, expected_crop[index], atol=1e-5 if dtype == "float32" else 5e-3)
    assert len(reads) == len(set(reads)) <= 24


def test_an_image_that_comes_twice_is_computed_once(store: Store, backbone: VisionTransformer, monkeypatch) -> None:
    """As class-aware sampling draws: in one batch, and again in a later one."""
    reads = []
    original = FeatureSource.pixels
    monkeypatch.setattr(FeatureSource, "pixels", lambda self, i, v: (reads.append(i), original(self, i, v))[1])
    expected = collect(make(store, backbone).training(0, in_batches(list(range(8)), 8)))
    reads.clear()
    batches = in_batches([5, 1, 5, 0, 1, 7, 5, 5, 5, 1, 0, 1], 3)
    found = list(make(store, backbone, cached_views=1).training(0, batches))
    assert sorted(reads) == [0, 1, 5, 7]
    for batch, (indices, features) in zip(batches, found, strict=True):
        assert np.array_equal(indices, batch)
        for index, row in zip(batch.tolist(), features.patches, strict=True):
            assert torch.allclose(row, expected[index], atol=1e-5)


def test_the_evaluation_view_is_the_centre_crop_without_a_flip(store: Store, backbone: VisionTransformer) -> None:
    source = make(store, backbone)
    assert np.array_equal(source.pixels(3, module.EVALUATION), evaluation_crop(store.read(3), 16))


def test_flips_happen_as_often_as_asked(store: Store, backbone: VisionTransformer) -> None:
    plain = make(store, backbone, augmentation=Augmentation(flip=0.0))
    flipped = make(store, backbone, augmentation=Augmentation(flip=1.0))
    assert np.array_equal(plain.pixels(2, 0)[:, ::-1], flipped.pixels(2, 0))
    half = make(store, backbone, augmentation=Augmentation(flip=0.5))
    count = sum(np.array_equal(half.pixels(2, view), flipped.pixels(2, view)) for view in range(200))
    assert 70 < count < 130


def test_a_cache_larger_than_the_memory_is_refused(store: Store, backbone: VisionTransformer, monkeypatch) -> None:
    source = make(store, backbone, cached_views=3)
    assert source.cache_bytes == 8 * 4 * 4 * (2 * 8 * (4 + 1) + 8)
    assert make(store, backbone).cache_bytes == 0
    monkeypatch.setattr(module, "usable_memory", lambda: 10_000)
    with pytest.raises(ConfigError, match="Lower augmented_views"):
        make(store, backbone, cached_views=3)


def test_read_ahead_keeps_order_and_passes_errors_on() -> None:
    batches = [np.array([3, 1]), np.array([2]), np.array([9, 8, 7])]
    found = list(read_ahead(batches, lambda index: index * 10, workers=3))
    assert [items for _, items in found] == [[30, 10], [20], [90, 80, 70]]

    def fail(index: int) -> int:
        raise ConfigError(f"index {index}")

    with pytest.raises(ConfigError, match="index 3"):
        list(read_ahead(batches, fail, workers=2))
    partly = read_ahead(batches, lambda index: index, workers=2)
    next(partly)
    partly.close()  # leaving early neither hangs nor raises


def test_an_unfrozen_backbone_is_our_own_mistake(backbone: VisionTransformer) -> None:
    with forked(0, "other"):
        training = VisionTransformer(backbone.config).train()
    with pytest.raises(AssertionError, match="evaluation mode"):
        extract(training, torch.zeros(1, 1, 16, 16, dtype=torch.uint8), RECIPE, 1, False)
    assert not any(parameter.requires_grad for parameter in freeze(training).parameters())


def test_kept_tokens_are_small_and_the_same_from_the_cache_as_computed(
    store: Store, backbone: VisionTransformer
) -> None:
    """Reduced to 5 directions in 8 bits: half a step apart at most, and the cache holds a byte a number."""
    fresh = make(store, backbone)
    batches = in_batches(list(range(8)), 3)
    reduction = fit_reduction((features for _, features in fresh.computed(-1, batches)), 5)
    sources = [make(store, backbone, cached_views=views, kept_channels=5) for views in (2, 0)]
    for source in sources:
        source.compaction = Kept(lambda features: features, reduction)
    for epoch in (0, 1, 2):
        whole = {
            int(i): t for ids, f in fresh.training(epoch % 2, batches) for i, t in zip(ids, f.patches, strict=True)
        }
        for source, view in zip(sources, (epoch, epoch % 2), strict=True):
            for ids, features in source.training(view, batches):
                assert features.patches.dtype == torch.float32
                for index, tokens in zip(ids, features.patches, strict=True):
                    expected = reduction.apply(whole[int(index)])
                    inside = expected.abs() <= 127 * reduction.steps
                    assert ((tokens - expected).abs() <= reduction.steps * 0.501)[inside].all()
    cache = sources[0].cache[0]
    assert cache.columns[2].dtype == torch.int8
    assert sources[0].cache_bytes == 8 * 3 * (4 * 5 + 8 * (2 + 1) * 4)
    assert sum(column.nbytes for column in cache.columns) * 3 == sources[0].cache_bytes
