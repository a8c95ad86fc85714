"""Weights over a socket arrive as they were sent, whatever their sizes and dtypes, and a stream that breaks says so."""

import socket
from collections.abc import Iterator
from threading import Thread

import pytest
import torch

from megaswift.rollout import weight_stream
from megaswift.rollout.vllm_worker import arriving
from megaswift.rollout.weight_stream import send_weights


class Alone:
    """A world of one worker, as vLLM's group coordinator describes it."""

    rank_in_group, world_size = 0, 1


def some_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (7, 5), "b.bias": (3,), "scalar": (), "empty": (0, 4), "long.weight": (300, 11)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found |= {f"{name}.half": one.to(torch.bfloat16) for name, one in found.items()}
    found["turned"] = torch.randn(6, 4, generator=generator).T  # rows that lie apart
    found["sixteen"] = torch.full((9,), float("nan"), dtype=torch.float16)
    return found


def received(offer: socket.socket, count: int = 1) -> list[dict[str, torch.Tensor]]:
    port = offer.getsockname()[1]
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]

    def listen(place: int) -> None:
        for name, tensor in arriving("127.0.0.1", port, "token", Alone(), "cpu"):
            found[place][name] = tensor.clone()

    threads = [Thread(target=listen, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    connections = [offer.accept()[0] for _ in range(count)]
    assert [one.recv(5) for one in connections] == [b"token"] * count
    send_weights(connections, iter(some_weights().items()))
    for thread in threads:
        thread.join()
    for connection in connections:
        connection.close()
    return found


@pytest.mark.parametrize("parcel", [1, 4096, weight_stream.PARCEL_BYTES])
def test_tensors_arrive_bit_for_bit(parcel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_stream, "PARCEL_BYTES", parcel)
    expected = some_weights()
    with socket.create_server(("127.0.0.1", 0)) as offer:
        for found in received(offer, count=2):
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
                assert torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7))


def test_a_stream_that_ends_too_soon_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as offer:
        failures: list[Exception] = []

        def listen() -> None:
            try:
                list(arriving("127.0.0.1", offer.getsockname()[1], "token", Alone(), "cpu"))
            except ConnectionError as error:
                failures.append(error)

        thread = Thread(target=listen)
        thread.start()
        connection, _ = offer.accept()
        assert connection.recv(5) == b"token"

        def weights() -> Iterator[tuple[str, torch.Tensor]]:
            yield "a", torch.zeros(4)
            yield "b", torch.zeros(4, dtype=torch.bfloat16)
            raise RuntimeError("a rank fails")

        with pytest.raises(RuntimeError):
            send_weights([connection], weights())
        connection.close()
        thread.join()
        assert "before its end" in str(failures[0])
