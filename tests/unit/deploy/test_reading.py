"""`Network.read` and `observe`: one pass says what `probabilities`, `attention` and the backbone say apart."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hilum.data.store import Store
from hilum.data.transforms import normalise
from hilum.deploy import predictor
from hilum.deploy.network import Network, raw_probabilities
from hilum.heads.features import to_batch


def network_of(fitted: Path, name: str) -> Network:
    [network] = predictor.load(fitted / name, "cpu").networks
    assert isinstance(network, Network)
    return network


@pytest.mark.parametrize("name", ["linear", "decoder"])  # the decoder's with flip mean
def test_a_reading_is_what_the_parts_say(fitted: Path, store: Store, name: str) -> None:
    network = network_of(fitted, name)
    squares = to_batch([network.crop(store.read(index)) for index in range(5)])
    reading = network.read(squares, attention=True)
    assert reading.probabilities.dtype == np.float64
    np.testing.assert_array_equal(reading.probabilities, network.probabilities(squares))
    np.testing.assert_array_equal(reading.attention, network.attention(network.features(squares), squares))
    with torch.no_grad():
        tokens = network.backbone(normalise(squares, network.recipe))
    assert reading.cls.dtype == reading.patch_mean.dtype == np.float32
    np.testing.assert_allclose(reading.cls, tokens.cls.numpy(), atol=1e-6)
    np.testing.assert_allclose(reading.patch_mean, tokens.patches.mean(dim=1).numpy(), atol=1e-6)
    assert network.read(squares).attention is None


def test_observers_see_every_batch_of_every_network(fitted: Path, store: Store) -> None:
    networks = predictor.load(fitted / "ensemble", "cpu").networks
    seen, found = [], []

    def observe(positions, readings) -> None:
        seen.append(positions)
        found.append([reading.probabilities for reading in readings])

    outputs, kept = raw_probabilities(
        networks, range(7), lambda index: None if index == 3 else store.read(index), 2, 1, observe=observe
    )
    assert np.concatenate(seen).tolist() == kept.tolist() == [0, 1, 2, 4, 5, 6]
    for number, values in enumerate(outputs):
        np.testing.assert_array_equal(np.concatenate([batch[number] for batch in found]), values)
