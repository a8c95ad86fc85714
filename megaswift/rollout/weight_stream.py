"""Weights on their way from the trainer to engines in other processes: over TCP, without a file and without pickle.

The trainer listens, an engine connects and names its token. Then parcels follow each other until one without tensors: the length
of a header (8 bytes, big-endian), the header (JSON: [name, dtype, shape] of each tensor, all of one dtype), and the bytes of the
tensors end to end. TCP works on one machine and between machines; the whole model leaves through one connection per server.
"""

import json
import math
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from megaswift.rollout.engine import Weights

PARCEL_BYTES = 2**26  # enough that headers cost nothing, little beside any model
LENGTH = struct.Struct(">Q")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a parcel."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def send_weights(connections: list[socket.socket], weights: Weights) -> None:
    """Send all weights to every connection; raises OSError."""
    for parcel in _parcels(weights):
        header = json.dumps(
            [(name, str(one.dtype).removeprefix("torch."), list(one.shape)) for name, one in parcel]
        ).encode()
        pieces = [one.contiguous().view(-1).view(torch.uint8).cpu().numpy().data for _, one in parcel]
        for connection in connections:
            connection.sendall(LENGTH.pack(len(header)) + header)
            for piece in pieces:
                connection.sendall(piece)
    for connection in connections:
        connection.sendall(LENGTH.pack(2) + b"[]")


def _parcels(weights: Weights) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yield neighbours of the same dtype together, some parcel sizes at a time."""
    parcel: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if parcel and (size + tensor.nbytes > PARCEL_BYTES or tensor.dtype != parcel[0][1].dtype):
            yield parcel
            parcel, size = [], 0
        parcel.append((name, tensor))
        size += tensor.nbytes
    if parcel:
        yield parcel


def receive_entries(connection: socket.socket) -> list[Entry]:
    """Return the header of the next parcel, empty at the end; raises OSError."""
    length = bytearray(LENGTH.size)
    _fill(connection, memoryview(length))
    header = bytearray(LENGTH.unpack(length)[0])
    _fill(connection, memoryview(header))
    return [
        Entry(name=name, dtype=DTYPES[dtype], shape=tuple(shape)) for name, dtype, shape in json.loads(header)
    ]


def receive_bytes(connection: socket.socket, entries: Iterable[Entry]) -> torch.Tensor:
    """Return the bytes of a parcel, uint8 on the CPU; raises OSError."""
    data = torch.empty(sum(one.size for one in entries), dtype=torch.uint8)
    _fill(connection, data.numpy().data)
    return data


def _fill(connection: socket.socket, buffer: memoryview) -> None:
    while buffer:
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError("the trainer closed the stream of weights before its end")
        buffer = buffer[count:]


def tensors_of(entries: Iterable[Entry], data: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a parcel as views of its bytes."""
    start = 0
    for one in entries:
        yield one.name, data[start : start + one.size].view(one.dtype).view(one.shape)
        start += one.size
