"""Which errors are those of a lost process, and what leaving does; real ones are in `programs/test_two_ranks.py`."""

from collections.abc import Iterator

import pytest
import torch
from torch.distributed import DistBackendError

from hilum.core import peers
from hilum.core.errors import ConfigError, PeerError
from hilum.core.peers import Peers

CLOSED = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:23456"
LATE = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv"


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(peers, "_SECONDS_BETWEEN_LOOKS", 0.01)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_errors_of_collectives_are_told_from_others() -> None:
    for error in (RuntimeError(CLOSED), RuntimeError(LATE), DistBackendError("NCCL error: remote process exited")):
        assert peers._is_of_a_collective(error)
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo"), KeyboardInterrupt()):
        assert not peers._is_of_a_collective(error)


@pytest.mark.parametrize(("text", "said"), [(CLOSED, "was lost"), (LATE, "did not answer in time")])
def test_a_broken_collective_becomes_a_sentence(group: None, text: str, said: str) -> None:
    with pytest.raises(PeerError, match=f"Another process of this run {said}.*HILUM_COLLECTIVE_TIMEOUT"), Peers(list):
        raise RuntimeError(text)


def test_a_process_that_is_lost_while_leaving_is_told_too(group: None) -> None:
    def barrier() -> None:
        raise RuntimeError(CLOSED)

    with pytest.raises(PeerError, match="was lost"), Peers(barrier):
        pass


def test_leaving_in_order_waits_and_failing_does_not(group: None) -> None:
    waited: list[int] = []
    with Peers(lambda: waited.append(1)) as all_:
        assert not all_.in_order
    assert all_.in_order
    with pytest.raises(SystemExit, match="75"), Peers(lambda: waited.append(2)):
        raise SystemExit(75)
    with pytest.raises(ConfigError, match="own"), Peers(lambda: waited.append(3)) as all_:
        raise ConfigError("own")
    assert waited == [1, 2]
    assert not all_.in_order


def test_who_is_not_the_first_to_fail_leaves_without_a_word(group: None) -> None:
    all_ = Peers(list)
    all_._store.add("speakers", 1)
    with pytest.raises(SystemExit, match="1"), all_:
        raise ConfigError("not to be read twice")
