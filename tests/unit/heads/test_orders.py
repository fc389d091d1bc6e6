import hashlib
from itertools import islice

import numpy as np
import pytest

from hilum.core.config import override
from hilum.core.errors import ConfigError, UnknownNameError
from hilum.core.seeding import stream
from hilum.heads.config import FitConfig
from hilum.heads.orders import epoch_orders

AWARE = FitConfig(sampling="class_aware")


def make_labels(count: int = 400) -> np.ndarray:
    labels = (np.random.default_rng(0).random((count, 3)) < [0.4, 0.1, 0.02]).astype(np.int8)
    labels[::9, 1] = -1
    return labels


def orders(config: FitConfig, labels: np.ndarray, epochs: int, phase: str = "search") -> list[np.ndarray]:
    images = np.arange(1000, 1000 + len(labels))
    return list(islice(epoch_orders(config, phase, images, labels, labels), epochs))


def test_the_default_order_never_changes() -> None:
    found = orders(FitConfig(seed=3), make_labels(), 3, "refit")
    for epoch, order in enumerate(found):
        assert np.array_equal(order, stream(3, "head order", "refit", epoch).permutation(np.arange(1000, 1400)))
    digest = hashlib.sha256(np.stack(found).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "381c22abb1ae48ed"


def test_class_aware_orders_repeat_and_follow_the_seed() -> None:
    labels = make_labels()
    first, again, other = (orders(override(AWARE, [f"seed={seed}"]), labels, 3) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(np.sort(first[0]), np.sort(first[1]))
    assert not np.array_equal(np.sort(first[0]), np.sort(orders(AWARE, labels, 1, "refit")[0]))
    assert all(len(order) == len(labels) for order in first)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_images_are_drawn_as_often_as_the_frequency_of_their_rarest_finding_says(power: float) -> None:
    """Counted by hand over one epoch: the images of a rarest finding together, to the image."""
    labels = make_labels()
    share = [(labels[:, c] == 1).sum() / (labels[:, c] >= 0).sum() for c in range(3)]
    rarest = [next((c for c in (2, 1, 0) if row[c] == 1), 3) for row in labels]
    share.append(np.mean([row.max() <= 0 for row in labels]))
    weights = np.array([share[c] ** -power for c in rarest])
    expected = weights / weights.sum() * len(labels)
    for order in orders(override(AWARE, [f"sampling_power={power}"]), labels, 5):
        counts = np.bincount(order - 1000, minlength=len(labels))
        assert (np.abs(counts - expected) < 1).all()
        for group in range(4):
            chosen = np.array(rarest) == group
            assert abs(counts[chosen].sum() - expected[chosen].sum()) < 1


def test_rare_findings_come_more_often() -> None:
    labels = make_labels()
    natural, aware = (np.concatenate(orders(config, labels, 20)) - 1000 for config in (FitConfig(), AWARE))
    assert (labels[aware, 2] == 1).mean() > 2 * (labels[natural, 2] == 1).mean()


def test_power_zero_is_every_image_once() -> None:
    [order] = orders(override(AWARE, ["sampling_power=0"]), make_labels(), 1)
    assert np.array_equal(np.sort(order), np.arange(1000, 1400))


def test_settings_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'class_aware'"):
        override(AWARE, ["sampling=clas_aware"])
    with pytest.raises(UnknownNameError, match="Did you mean 'sampling_power'"):
        override(AWARE, ["sampling_powr=1"])
    with pytest.raises(ConfigError, match="sampling_power: expected 0 to 2, found -1"):
        override(AWARE, ["sampling_power=-1"])
