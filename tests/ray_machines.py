"""Two machines of a Ray cluster on this one: each is a Ray node with processes of its own.

Where this user may make network namespaces, each node has one, and a cable lies between them: they
share no loopback and no port, as two machines do not, and nothing else reaches them. Elsewhere both
are on the loopback, under two addresses of it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPO = Path(__file__).parents[1]
# Ray keeps sockets in its folder, whose names may have 107 characters: pytest's folders are too long.
SHORT = "/tmp"
PATIENCE = 180  # seconds: a busy machine starts a node slowly


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Machine:
    """One node.

    address : of the machine, as the other reaches it.
    enter : words before a command that is to run on it.
    log : what its processes say.
    process : the command that started it, which stays; None while it is off.
    """

    address: str
    enter: list[str]
    log: Path
    process: subprocess.Popen | None = None

    def processes(self) -> list[psutil.Process]:
        """All processes of the node."""
        if self.process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def kill(self) -> None:
        """Cut the power."""
        # stopped first, so that none of them sees another go and tidies up
        family = self.processes()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGSTOP)
        family = list({*family, *self.processes()})
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        if self.process is not None:
            self.process.wait()
        psutil.wait_procs(family, timeout=60)
        self.process = None


@dataclass
class TwoMachines:
    """A cluster of two nodes of one processor each; the first is its head.

    work : folder for all that lies about; it is removed.
    environment : of all processes.
    machines : the two.
    port : where the head listens.
    holders : processes that keep the network namespaces.
    """

    work: Path
    environment: dict[str, str]
    machines: list[Machine] = field(default_factory=list)
    port: int = 0
    holders: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.machines[0].address}:{self.port}"

    def start(self) -> None:
        addresses = ["10.231.7.1", "10.231.7.2"]
        entering = self._two_networks(addresses)
        if entering is None:
            addresses = ["127.0.0.2", "127.0.0.3"]
            entering = [[], []]
        self.port = free_port()
        for address, enter in zip(addresses, entering, strict=True):
            self.machines.append(Machine(address, enter, self.work / f"{address}.log"))
        for number in (0, 1):
            self.turn_on(number)

    def _two_networks(self, addresses: list[str]) -> list[list[str]] | None:
        """Make two namespaces with a cable between them, or say that this is not allowed."""
        if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
            return None
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        entering = []
        for _ in addresses:
            holder = subprocess.Popen(["unshare", "--net", "sleep", "3600"], **quiet)
            self.holders.append(holder)
            entering.append(["nsenter", "--net", f"--target={holder.pid}"])
        first, second = (str(holder.pid) for holder in self.holders)
        time.sleep(0.5)  # until both are in their namespaces
        commands = [
            [*entering[0], "ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable"]
            + ["netns", second]
        ]
        for address, enter in zip(addresses, entering, strict=True):
            commands.append([*enter, "ip", "address", "add", f"{address}/24", "dev", "cable"])
            commands.append([*enter, "ip", "link", "set", "cable", "up"])
            commands.append([*enter, "ip", "link", "set", "lo", "up"])
        own = os.readlink("/proc/self/ns/net")
        try:
            for holder in (first, second):
                if os.readlink(f"/proc/{holder}/ns/net") == own:
                    return None
            for command in commands:
                subprocess.run(command, check=True, **quiet)
        except (OSError, subprocess.CalledProcessError):
            return None
        return entering

    def turn_on(self, number: int) -> None:
        """Start a node, and wait until it has joined."""
        machine = self.machines[number]
        command = [*machine.enter, sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        if number == 0:
            command += ["--head", f"--port={self.port}", f"--temp-dir={self.work / 'ray'}"]
            command += ["--include-dashboard=false", "--dashboard-host=127.0.0.1"]
            command += [f"--ray-client-server-port={free_port()}"]
        else:
            command += [f"--address={self.address}"]
        command += [f"--node-ip-address={machine.address}", "--num-cpus=1", "--num-gpus=0"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        # whatever is free
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        machine.log.write_text("")
        with open(machine.log, "a") as log:
            machine.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + PATIENCE
        while "Ray runtime started" not in machine.log.read_text():
            alive = machine.process.poll() is None and time.monotonic() < end
            assert alive, machine.log.read_text()[-3000:]
            time.sleep(0.1)

    def run(self, *words) -> subprocess.Popen:
        """Start `medtune` on the first machine."""
        program = "import sys; from medtune.cli import main; main(sys.argv[1:])"
        command = [*self.machines[0].enter, sys.executable, "-c", program, *map(str, words)]
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.holders.append(process)
        return process

    def stop(self) -> None:
        """End every process, and remove the folder."""
        for machine in reversed(self.machines):
            machine.kill()
        for holder in self.holders:
            holder.kill()
            holder.wait()
        # what has lost its parent still names the folder, which nobody else has
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.work) in " ".join(process.cmdline()):
                    process.kill()
        shutil.rmtree(self.work, ignore_errors=True)


@contextlib.contextmanager
def two_machines():
    """A running cluster, of which nothing is left afterwards."""
    work = Path(tempfile.mkdtemp(prefix="mt", dir=SHORT))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(work / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",
        # a killed node refuses connections at once: five refusals in five seconds. One that is only
        # slow has ten seconds for each answer.
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
    }
    cluster = TwoMachines(work, environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
