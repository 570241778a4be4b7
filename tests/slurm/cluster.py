"""A real SLURM of two nodes on this machine: munged, slurmctld and two slurmd in a folder of their own.

Needs root and, where the programs are missing, apt. Each node claims 8 CPUs and two GPUs, which are /dev/null
under another name; n1 and n2 are names of this machine in /etc/hosts.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
NODES = ("n1", "n2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
# cred_expire: how long a requeued job waits. 6 s is the least that slurmctld takes, the default is 120.
# SlurmdTimeout: a node that is silent for so long is down.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=6
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=batch_sched_delay=1,sched_interval=2
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=5
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=16000 Gres=gpu:2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=16000 Gres=gpu:2
PartitionName=ci Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


class Unavailable(Exception):
    """This machine cannot run the cluster; the message says why."""


class Cluster:
    """Owns the daemons between `__enter__` and `__exit__`, and their files in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Without what Accelerate left in this process, whose jobs would inherit it.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
        self._environment = {**kept, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        """Raises Unavailable where it cannot be had."""
        _require_programs()
        _require_host_names()
        self._write_files()
        try:
            self._start("munged", "munged", "--foreground", "--force", *_munge_options(self.folder / "munge"))
            self._start("slurmctld", "slurmctld", "-D", "-c")
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes("idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            for name in self.unfinished():
                self.slurm("scancel", name, check=False)
            deadline = time.monotonic() + 20
            while self.unfinished() and time.monotonic() < deadline:
                time.sleep(0.2)
        for name in list(self._daemons):
            self._stop(name)

    def slurm(self, *command: str, check: bool = True, **environment: str) -> str:
        """What a command of SLURM prints; it runs in the repository's root."""
        done = subprocess.run(
            command, cwd=ROOT, env={**self._environment, **environment}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 or not check, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, *arguments: str, **environment: str) -> str:
        """The id of the job that `sbatch` makes of `arguments`."""
        return self.slurm("sbatch", "--parsable", *arguments, **environment).split("\n")[-2].split(";")[0]

    def job(self, name: str) -> dict[str, str]:
        """What `scontrol show job` says of one job."""
        words = self.slurm("scontrol", "show", "job", "--oneliner", name).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def unfinished(self) -> list[str]:
        """Ids of jobs that wait or run."""
        return self.slurm("squeue", "--noheader", "--format=%i", check=False).split()

    def wait(self, name: str, *states: str, seconds: float = 120) -> dict[str, str]:
        """The job once it is in one of `states`, by default ended; a job that ends otherwise fails the test."""
        states = states or ENDED
        deadline = time.monotonic() + seconds
        while (job := self.job(name))["JobState"] not in states:
            assert job["JobState"] not in ENDED, f"job {name} ended as {job['JobState']} {job['ExitCode']}"
            assert time.monotonic() < deadline, f"job {name} is {job['JobState']} ({job['Reason']}), not {states}"
            time.sleep(0.2)
        return job

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As if its power failed: slurmd, its steps and their processes die at once."""
        kill([self._daemons[node].pid, *processes_of(node)])
        self._daemons.pop(node).wait()

    def wait_for_nodes(self, state: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while set(states := self.slurm("sinfo", "-N", "--noheader", "--format=%t", check=False).split()) != {state}:
            assert time.monotonic() < deadline, f"nodes are {states}:\n" + self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        """The daemons' last words."""
        return "".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                command, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )

    def _stop(self, name: str) -> None:
        process = self._daemons.pop(name)
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _write_files(self) -> None:
        for name in ("munge", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge/key").write_bytes(os.urandom(128))
        (self.folder / "munge/key").chmod(0o400)
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(folder=self.folder, ports=_free_ports(3)))
        gpus = [self.folder / f"gpu{index}" for index in (0, 1)]
        for gpu in gpus:
            os.mknod(gpu, 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-1]\n")


def processes_of(node: str, job: str | None = None) -> list[int]:
    """Processes of jobs on a node, the steps' managers among them; those of one job only, without the managers."""
    wanted = {b"SLURMD_NODENAME=" + node.encode()} | ({b"SLURM_JOB_ID=" + job.encode()} if job else set())
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((path / "environ").read_bytes().split(b"\0"))
            words = (path / "cmdline").read_bytes()
        except OSError:  # it ended
            continue
        manager = words.startswith(b"slurmstepd") and job is None and f"-{node}".encode() in words
        if wanted <= environment or manager:
            found.append(int(path.name))
    return found


def kill(pids: Iterable[int]) -> None:
    """kill -9 of those that still live."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _require_programs() -> None:
    if os.geteuid() != 0:
        raise Unavailable("SLURM's daemons run as root here, and this user is not root")
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise Unavailable(f"{', '.join(missing)} not installed, and there is no apt-get to install {PACKAGES} with")
    # RUNLEVEL=1 keeps the packages from starting their own services.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update", "-qq"], ["install", "-qq", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *command], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(f"apt-get {' '.join(command)} failed: {done.stderr.strip()[-500:]}")


def _require_host_names() -> None:
    hosts = Path("/etc/hosts")
    names = {name for line in hosts.read_text().splitlines() for name in line.split("#")[0].split()[1:]}
    if not names >= set(NODES):
        with hosts.open("a") as file:
            file.write(f"127.0.0.1 {' '.join(NODES)}\n")


def _munge_options(folder: Path) -> list[str]:
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return [f"--{option}={folder / name}" for option, name in files.items()]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
