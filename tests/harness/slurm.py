"""A real Slurm on this machine for tests: munged, slurmctld and one slurmd a virtual node, each node in its own network
namespace with its own host name and /dev/shm.

Needs root, the Debian package slurm-wlm (22.05) and permission to make namespaces; `why_not` says what is missing.
Slurm's settings follow slurm.conf(5); the reasons for the unusual ones stand beside them.
"""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.harness.hosts import VirtualHosts, search_path, why_no_hosts

START_S = 60.0
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


def why_not() -> str | None:
    """Return why no cluster can be started here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm)" if missing else why_no_hosts()


class CallError(Exception):
    """A client's command that failed."""

    def __init__(self, words: Sequence[str], code: int, stderr: str) -> None:
        super().__init__(f"{' '.join(words[:5])} ended with {code}: {stderr}")
        self.code, self.stderr = code, stderr


class SlurmCluster:
    """Virtual nodes node1, node2, ... behind a bridge; the file system is shared, as on a real cluster."""

    def __init__(self, *, nodes: int = 2, cpus: int = 4, gpus: int = 0) -> None:
        """`gpus` of each node are devices like /dev/null: enough for Slurm, nothing for CUDA."""
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        # munged refuses a socket below a folder that others may not enter.
        self.folder = Path(tempfile.mkdtemp(prefix="megaswift-slurm-"))
        self.folder.chmod(0o755)
        self._hosts = VirtualHosts(nodes, folder=self.folder)
        self._port = 20000 + 3 * (os.getpid() % 1000)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environ(self) -> dict[str, str]:
        """The environment of a client; without what this process may have from an outer job or launcher."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MEGASWIFT_"))
        }
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": search_path()}

    def __enter__(self) -> "SlurmCluster":
        try:
            self._configure()
            self._hosts.__enter__()
            self._daemon("munged", ["munged", "--foreground", *self._munge_files()])
            wait_for(lambda: (self.folder / "munge.socket").exists(), START_S, "munged")
            self._daemon("slurmctld", ["slurmctld", "-D", "-f", self.environ["SLURM_CONF"]])
            for number in range(1, self.nodes + 1):
                self.start_node(number)
            wait_for(self._all_idle, START_S, "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(CallError, subprocess.TimeoutExpired):
            self.call("scancel", "--user=root", timeout=10)
        for name in [*(f"node{number}" for number in range(1, self.nodes + 1)), "slurmctld", "munged"]:
            if name.startswith("node"):
                self.kill_node(int(name[4:]))
            elif name in self._daemons:
                _end(self._daemons.pop(name))
        self._hosts.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, *words: str, timeout: float = 60, cwd: Path | None = None, **environ: str) -> str:
        """Run a client's command and return its output; raises CallError."""
        done = subprocess.run(
            words, env={**self.environ, **environ}, cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise CallError(words, done.returncode, done.stderr)
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """Return `scontrol show job` as a dictionary."""
        words = self.call("scontrol", "show", "job", "--oneliner", job_id).split()
        return {name: value for name, _, value in (word.partition("=") for word in words)}

    def wait(self, job_id: str, *states: str, timeout: float) -> str:
        """Return the first of `states` that a job reaches; raises TimeoutError."""

        def reached() -> bool:
            return self.job(job_id)["JobState"] in states

        wait_for(reached, timeout, f"job {job_id} to be {' or '.join(states)}", poll_s=0.5)
        return self.job(job_id)["JobState"]

    def start_node(self, number: int) -> None:
        """Start a node's slurmd in the node's namespaces."""
        slurmd = f"slurmd -D -N node{number} -f {self.environ['SLURM_CONF']}"
        self._daemon(f"node{number}", self._hosts.on(number, slurmd))

    def kill_node(self, number: int) -> None:
        """End everything that lives on a node at once: its slurmd, its jobs' shepherds and their tasks."""
        with contextlib.suppress(FileNotFoundError):
            namespace = Path("/run/netns", self._hosts.namespace(number)).stat().st_ino
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if (process / "ns" / "net").stat().st_ino == namespace:
                        os.kill(int(process.name), signal.SIGKILL)
        daemon = self._daemons.pop(f"node{number}", None)
        if daemon is not None:
            daemon.wait(timeout=10)

    def processes_on(self, number: int, having: str) -> list[int]:
        """Return the processes of a node whose command line has `having`."""
        namespace = Path("/run/netns", self._hosts.namespace(number)).stat().st_ino
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().decode(errors="replace")
                if having in words and (process / "ns" / "net").stat().st_ino == namespace:
                    found.append(int(process.name))
        return found

    def _daemon(self, name: str, words: list[str]) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self._daemons[name] = subprocess.Popen(
            words, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    def _munge_files(self) -> list[str]:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munge.pid",
            "log-file": "munge.log",
            "seed-file": "munge.seed",
        }
        return [f"--{option}={self.folder}/{file}" for option, file in names.items()]

    def _configure(self) -> None:
        host = os.uname().nodename.split(".")[0]
        for folder in ("state", "spool", "tmp"):
            (self.folder / folder).mkdir()
        for number in range(1, self.nodes + 1):
            (self.folder / "tmp" / f"node{number}").mkdir()
        settings: Mapping[str, object] = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}({self._hosts.network}.254)",
            "SlurmctldPort": self._port,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            # cred_expire is also how long a requeued job waits before it starts again; 120 s by default
            "AuthInfo": f"socket={self.folder}/munge.socket,cred_expire=5",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "TmpFS": f"{self.folder}/tmp/%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd.%n.pid",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",  # no cgroups
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerParameters": "bf_interval=1,sched_interval=2,batch_sched_delay=0",
            "SlurmdParameters": "config_overrides",  # more cores than the machine has
            "ReturnToService": 2,
            "JobRequeue": 1,
            "KillWait": 10,
            "MinJobAge": 3600,
            "SlurmdTimeout": 20,
            "MessageTimeout": 60,  # a busy machine answers late, and a client must not take that for a failure
            "PropagateResourceLimits": "NONE",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for number in range(1, self.nodes + 1):
            address = f"{self._hosts.network}.{number}"
            lines.append(
                f"NodeName=node{number} NodeHostname=node{number} NodeAddr={address} Port={self._port + 1} "
                f"CPUs={self.cpus} RealMemory=64000 {f'Gres=gpu:{self.gpus} ' if self.gpus else ''}State=UNKNOWN"
            )
        lines.append(f"PartitionName=test Nodes=node[1-{self.nodes}] Default=YES MaxTime=INFINITE State=UP")
        if self.gpus:
            self._make_gpus()
            lines.insert(0, "GresTypes=gpu")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _make_gpus(self) -> None:
        null = os.makedev(1, 3)
        for number in range(self.gpus):
            os.mknod(self.folder / f"gpu{number}", 0o666 | stat.S_IFCHR, null)
        devices = f"{self.folder}/gpu[0-{self.gpus - 1}]"
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=node[1-{self.nodes}] Name=gpu File={devices}\n"
        )

    def _all_idle(self) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended: {(self.folder / f'{name}.log').read_text()[-2000:]}")
        with contextlib.suppress(CallError, subprocess.TimeoutExpired):
            states = self.call("sinfo", "-h", "-N", "-o", "%T", timeout=5).split()
            return states == ["idle"] * self.nodes
        return False


def _end(daemon: "subprocess.Popen[bytes]") -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def wait_for(condition: Callable[[], bool], timeout: float, what: str, *, poll_s: float = 0.2) -> None:
    """Return when `condition` holds; raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:.0f} s for {what}")
        time.sleep(poll_s)


@contextlib.contextmanager
def running_cluster(*, nodes: int = 2, cpus: int = 4, gpus: int = 0) -> Iterator[SlurmCluster]:
    """Yield a cluster and take it down again."""
    with SlurmCluster(nodes=nodes, cpus=cpus, gpus=gpus) as cluster:
        yield cluster
