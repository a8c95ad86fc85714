"""A file's bytes without a copy of them, and an error rather than the end of the process where they cannot be read."""

import ctypes
import errno
import mmap
import os
from pathlib import Path

import numpy as np

from megaswift.errors import CheckpointError

MAPPED_BYTES = 64 << 20  # of a file that count as this process's memory, before they are let go
_MADV_POPULATE_READ = 22  # asm-generic/mman-common.h; Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)  # Python's own madvise keeps the other threads waiting
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedFile:
    """The bytes of a file, mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb", buffering=0) as file:
            self.num_bytes = os.fstat(file.fileno()).st_size
            self._map = (
                mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if self.num_bytes else mmap.mmap(-1, 1)
            )
        self._view = memoryview(self._map)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data
        self._mapped = 0

    def read(self, at: int, num_bytes: int) -> memoryview:
        """Return some bytes, which are in memory; raises CheckpointError where there are none, OSError."""
        if at + num_bytes > self.num_bytes:
            raise CheckpointError(
                f"{self._path} ends at byte {self.num_bytes}, earlier than its header says. Copy the file again."
            )
        if self._mapped > MAPPED_BYTES:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._mapped = 0
        self._mapped += num_bytes
        begin = at - at % mmap.PAGESIZE
        # A byte that cannot be read is an error here, where a mere access would end the process.
        if not _libc.madvise(self._address + begin, at + num_bytes - begin, _MADV_POPULATE_READ):
            return self._view[at : at + num_bytes]
        error = ctypes.get_errno()
        if error == errno.EINVAL:  # an older Linux
            with self._path.open("rb") as file:
                file.seek(at)
                data = file.read(num_bytes)
            if len(data) == num_bytes:
                return memoryview(data)
        elif error != errno.EFAULT:
            raise OSError(error, os.strerror(error), str(self._path))
        raise CheckpointError(
            f"{self._path} cannot be read at byte {at}: it was cut off meanwhile, or its disk failed. Copy it again."
        )
