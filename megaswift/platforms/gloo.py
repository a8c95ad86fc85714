"""One network thread for all gloo groups of a rank.

torch (2.4-2.13) gives every group a device of its own, whose thread wakes up a hundred times a second (gloo,
transport/tcp/loop.cc). Megatron makes some twenty groups: on processors they take 5 % of a rank's time, and more than that
where ranks share a machine.
"""

import os
from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import ProcessGroupGloo, distributed_c10d


class _AnyGloo(type(ProcessGroupGloo)):  # type: ignore[misc]  # pybind's metaclass
    def __instancecheck__(cls, instance: Any) -> bool:
        """torch asks whether a group that it gets back from C++ is of this class: it is of the base class then."""
        return isinstance(instance, ProcessGroupGloo)


class SharedGloo(ProcessGroupGloo, metaclass=_AnyGloo):
    """A gloo group on the devices that all groups of this process share."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        options._timeout = timeout
        options._threads = 2 * len(options._devices)  # as torch has it
        super().__init__(store, rank, size, options)


@cache
def _devices(interfaces: str) -> list[Any]:
    """Return the devices of the interfaces, separated by commas, or of the host's name; as torch chooses them."""
    if not interfaces:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]


def share_gloo_devices() -> None:
    """Let groups that are made from now on share their devices; a second call changes nothing."""
    distributed_c10d.ProcessGroupGloo = SharedGloo
