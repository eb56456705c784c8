"""Two machines of a Ray cluster on this one: each is a Ray node with processes of its own.

Where this user may make network namespaces, each node has one, and a cable lies between them: they
share no loopback and no port, as two machines do not, and nothing else reaches them. Elsewhere both
are on the loopback, under two addresses of it.
"""

import contextlib
import os
import shutil
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
PATIENCE = 240  # seconds: a busy machine starts a node slowly
ATTEMPTS = 4
# `ray start` without the server for clients outside of the cluster, which takes seconds to start: it
# is left out where grpc is missing, and only then.
NODE = "import sys; sys.modules['grpc'] = None; from ray.scripts.scripts import main; main()"
COMMAND = "import sys; from medtune.cli import main; main(sys.argv[1:])"
# Even if the tests are killed, nothing goes on: what these start ends with whoever started it, and
# the first process of such a namespace takes all others along.
DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
OWN_PROCESSES = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@dataclass
class Machine:
    """One node.

    address : of the machine, as the other reaches it.
    wire : words before a command that put it into the machine's network.
    log : what its processes say.
    alone : whether its processes have a namespace, which ends with the first of them.
    process : the command that started the node, and stays; None while it is off.
    """

    address: str
    wire: list[str]
    log: Path
    alone: bool
    process: subprocess.Popen | None = None

    def processes(self) -> list[psutil.Process]:
        """All processes of the node, the one that started it first."""
        if self.process is None:
            return []
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def enter(self) -> list[str]:
        """Words before a command that shall run on the machine."""
        if not self.alone:
            return []
        first = self.processes()[1]
        return ["nsenter", "--net", "--pid", "--mount", f"--target={first.pid}"]

    def kill(self) -> None:
        """Cut the power."""
        family = self.processes()
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
    others : processes that keep the networks, and those that `run` started.
    """

    work: Path
    environment: dict[str, str]
    machines: list[Machine] = field(default_factory=list)
    port: int = 0
    others: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{self.machines[0].address}:{self.port}"

    def start(self) -> None:
        addresses = ["10.231.7.1", "10.231.7.2"]
        wires = self._two_networks(addresses)
        alone = wires is not None
        if wires is None:
            addresses = ["127.0.0.2", "127.0.0.3"]
            wires = [[], []]
        for address, wire in zip(addresses, wires, strict=True):
            self.machines.append(Machine(address, wire, self.work / f"{address}.log", alone))
        for number in (0, 1):
            self.turn_on(number)

    def _two_networks(self, addresses: list[str]) -> list[list[str]] | None:
        """Make two networks with a cable between them, or say that this is not allowed."""
        if not all(map(shutil.which, ("unshare", "nsenter", "ip", "setpriv"))):
            return None
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        wires = []
        for _ in addresses:
            holder = subprocess.Popen([*DIES_WITH_US, "unshare", "--net", "sleep", "3600"], **quiet)
            self.others.append(holder)
            wires.append(["nsenter", "--net", f"--target={holder.pid}"])
        first, second = (holder.pid for holder in self.others)
        cable = ["ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable"]
        commands = [[*wires[0], *cable, "netns", str(second)]]
        for address, wire in zip(addresses, wires, strict=True):
            commands.append([*wire, "ip", "address", "add", f"{address}/24", "dev", "cable"])
            commands.append([*wire, "ip", "link", "set", "cable", "up"])
            commands.append([*wire, "ip", "link", "set", "lo", "up"])
        # and a namespace of processes can be made
        commands.append([*OWN_PROCESSES, "true"])
        try:
            for holder in (first, second):
                wait_for_network_of_its_own(holder)
            for command in commands:
                subprocess.run(command, check=True, **quiet)
        except (OSError, subprocess.CalledProcessError):
            return None
        return wires

    def turn_on(self, number: int) -> None:
        """Start a node, and wait until it has joined.

        A node gives up if its helpers are not there after half a minute, which they are not always
        on a busy machine: then it is started anew.
        """
        machine = self.machines[number]
        for _ in range(ATTEMPTS):
            self._start_node(number)
            while "Ray runtime started" not in machine.log.read_text():
                if machine.process.poll() is not None:
                    break
                time.sleep(0.1)
            else:
                return
            machine.kill()
        raise AssertionError(f"not in {ATTEMPTS} attempts: {machine.log.read_text()[-3000:]}")

    def _start_node(self, number: int) -> None:
        machine = self.machines[number]
        command = [*machine.wire, *DIES_WITH_US, *OWN_PROCESSES] if machine.alone else []
        command += [sys.executable, "-c", NODE, "start", "--block"]
        if number == 0:
            self.port = free_port()
            command += ["--head", f"--port={self.port}", f"--temp-dir={self.work / 'ray'}"]
            command += ["--include-dashboard=false", "--dashboard-host=127.0.0.1", "--no-monitor"]
        else:
            command += [f"--address={self.address}"]
        command += [f"--node-ip-address={machine.address}", "--num-cpus=1", "--num-gpus=0"]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        # whatever is free
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        command += ["--dashboard-agent-listen-port=0", "--include-log-monitor=false"]
        machine.log.write_text("")
        with open(machine.log, "a") as log:
            machine.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        # A node whose helpers start too slowly gives up. Linux shares processors out by sessions: where
        # this user may, that of the node comes before others.
        with contextlib.suppress(OSError):
            Path(f"/proc/{machine.process.pid}/autogroup").write_text("-10")

    def run(self, *words) -> subprocess.Popen:
        """Start `medtune` on the first machine."""
        return self.run_program(COMMAND, *words)

    def run_program(self, program: str, *words) -> subprocess.Popen:
        """Start some Python on the first machine."""
        command = [*self.machines[0].enter(), sys.executable, "-c", program, *map(str, words)]
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.others.append(process)
        return process

    def stop(self) -> None:
        """End every process, and remove the folder."""
        for machine in reversed(self.machines):
            machine.kill()
        for other in self.others:
            other.kill()
            other.wait()
        # what has lost its parent still names the folder, which nobody else has
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.work) in " ".join(process.cmdline()):
                    process.kill()
        shutil.rmtree(self.work, ignore_errors=True)


def wait_for_network_of_its_own(pid: int) -> None:
    """Wait until a process has left this network; OSError if it ends instead."""
    own = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{pid}/ns/net") == own:
        time.sleep(0.01)


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
        "RAY_raylet_start_wait_time_s": "60",
        "RAY_agent_register_timeout_ms": str(1000 * PATIENCE),
        "RAY_worker_register_timeout_seconds": str(PATIENCE),
    }
    cluster = TwoMachines(work, environment)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
