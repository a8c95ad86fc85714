"""Hosts on this machine for tests: network namespaces behind a bridge, each with its own name and address.

The file system is shared, as on a cluster; /dev/shm and the loopback interface are private. `why_no_hosts` says why there
are none where that is so.
"""

import os
import shutil
import subprocess
from pathlib import Path


def why_no_hosts() -> str | None:
    """Return why no virtual hosts can be made here, or None."""
    missing = [
        name for name in ("ip", "nsenter", "unshare") if shutil.which(name, path=search_path()) is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "virtual hosts need root"
    if subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True).returncode:
        return "this machine does not allow network namespaces"
    return None


class VirtualHosts:
    """Hosts node1, node2, ...; this machine itself has the address ending in 254."""

    def __init__(self, count: int, *, folder: Path) -> None:
        """`folder` takes the hosts file."""
        self.count, self._hosts = count, folder / "hosts"
        tag = os.getpid() % 10000
        self.bridge, self.network = f"ms{tag}", f"10.{100 + tag // 250}.{tag % 250}"

    def __enter__(self) -> "VirtualHosts":
        host = os.uname().nodename.split(".")[0]
        names = [f"{self.network}.{number} node{number}" for number in range(1, self.count + 1)]
        self._hosts.write_text(
            "\n".join(["127.0.0.1 localhost", f"{self.network}.254 {host}", *names]) + "\n"
        )
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.network}.254/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for number in range(1, self.count + 1):
            namespace, outer = self.namespace(number), f"{self.bridge}v{number}"
            _ip("netns", "add", namespace)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", outer, "master", self.bridge, "up")
            _ip("-n", namespace, "addr", "add", f"{self.network}.{number}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for number in range(1, self.count + 1):
            subprocess.run(["ip", "link", "del", f"{self.bridge}v{number}"], capture_output=True)
            subprocess.run(["ip", "netns", "del", self.namespace(number)], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def namespace(self, number: int) -> str:
        """Return the name of a host's network namespace."""
        return f"{self.bridge}-node{number}"

    def on(self, number: int, command: str) -> list[str]:
        """Return the words that run a shell command on a host."""
        script = f"mount --bind {self._hosts} /etc/hosts && hostname node{number} && mount -t tmpfs tmpfs /dev/shm && "
        enter = ["nsenter", f"--net=/run/netns/{self.namespace(number)}", "unshare", "--uts", "--mount"]
        return [*enter, "--propagation", "private", "bash", "-c", script + f"exec {command}"]


def search_path() -> str:
    """Return PATH with the folders of the administrator's programs."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
