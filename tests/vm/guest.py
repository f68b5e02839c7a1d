# SPDX-License-Identifier: Apache-2.0
"""Boots a guest, runs commands in it, and brings their results back.

Two disks besides the root: on one the job goes in, on the other the results come out, both as plain tar archives. The
results are written again after each command, so that what was done is kept when the guest is lost later.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.vm.images import Image

CHECKOUT = Path(__file__).resolve().parents[2]
CPUS = 2
MEMORY = "2G"
TOTAL_S = 2400
SILENCE_S = 600  # an emulated machine under load is slow, but it says something now and then
RESULTS = "/run/results"
_RESULTS_BYTES = 64 << 20
# tsc=reliable: without it the kernel patches its clock's code early on, which now and then trips QEMU with many CPUs.
_COMMAND_LINE = "console=ttyS0 quiet mitigations=off panic=-1 rdinit=/init random.trust_cpu=on tsc=reliable"
_BOOTS = 3


class GuestLost(Exception):
    """The machine, not a test: it did not boot, panicked, or went silent. Holds the end of its console."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to run in the checkout. Files that it leaves in RESULTS come back, its output as `<name>.out`."""

    name: str
    arguments: Sequence[str]


@dataclass(frozen=True, slots=True)
class Result:
    """Exit status and output of each command that ended, the files it left, and why not all did."""

    statuses: Mapping[str, int]
    files: Mapping[str, str]
    lost: GuestLost | None
    boot_s: float
    total_s: float

    def text(self, name: str, command: str) -> str:
        """A file of a command. Raises `GuestLost` where the guest did not live to write it."""
        if command not in self.statuses:
            raise self.lost or GuestLost(f"no result of {command}")
        return self.files.get(name, "")


# PID 1: where the preparation fails, it ends and the kernel panics, which reads as a lost guest.
_INSIDE = """\
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb PYTHONDONTWRITEBYTECODE=1
mount -t tmpfs tmpfs /run
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo "+memory +io +cpu +pids" >/sys/fs/cgroup/cgroup.subtree_control
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
mount -t tracefs -o mode=0700 tracefs /sys/kernel/tracing
depmod
modprobe loop
echo guest >/proc/sys/kernel/hostname
ip link set lo up
mkdir $results
cd /job/checkout
cut -d' ' -f1 /proc/uptime >$results/boot
report() { tar -C $results -cf /dev/vdc . && sync; }
report
run() { # name command...
	name=$1
	shift
	echo "guest: $name"
	{ status=0; "$@" || status=$?; echo $status >$results/$name.status; } 2>&1 </dev/null | tee $results/$name.out
	report
}
"""
_END = """\
echo "guest: end"
touch $results/end
report
echo b >/proc/sysrq-trigger
sleep 60
"""


def _script(commands: Sequence[Command]) -> str:
    runs = "".join(f"run {shlex.join([one.name, *one.arguments])}\n" for one in commands)
    return f"results={RESULTS}\n{_INSIDE}{runs}{_END}"


def _job(script: str, path: Path) -> None:
    """What process 1 runs, and the working tree's files, as git knows them, new ones included."""
    git = ("git", "-c", "safe.directory=*", "-C", CHECKOUT)
    files = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listing = subprocess.run((*git, *files), check=True, stdout=subprocess.PIPE).stdout.decode()
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("inside")
        entry.size = len(script.encode())
        archive.addfile(entry, io.BytesIO(script.encode()))
        for name in sorted(set(filter(None, listing.split("\0")))):
            if (CHECKOUT / name).is_file():
                archive.add(CHECKOUT / name, f"checkout/{name}")


def _disk(path: Path, read_only: bool = False) -> list[str]:
    return ["-drive", f"file={path},format=raw,if=virtio,cache=unsafe,readonly={'on' if read_only else 'off'}"]


def run(image: Image, commands: Sequence[Command], cpus: int = CPUS, total_s: float = TOTAL_S) -> Result:
    """Boots, runs all commands one after the other, ends. A lost guest is part of the result, not an exception.

    A guest that is lost before any of the commands began says nothing about them, and is booted again.
    """
    for _ in range(_BOOTS):
        result = _run(image, _script(commands), cpus, total_s)
        if not result.lost or "boot" in result.files:
            break
    return result


def boot(image: Image, script: str, total_s: float) -> Result:
    """Boots with `script` as process 1, and keeps what is written to the root file system.

    Somebody in there has to write a tar of results to /dev/vdc, with a file `end` in it, and to end the machine; a
    reboot ends it, too.
    """
    return _run(image, script, CPUS, total_s, keep=True)


def _run(image: Image, script: str, cpus: int, total_s: float, keep: bool = False) -> Result:
    with tempfile.TemporaryDirectory(prefix="bpfmetricsd-vm-") as name:
        folder = Path(name)
        console = folder / "console"
        _job(script, folder / "job")
        with open(folder / "results", "wb") as results:
            results.truncate(_RESULTS_BYTES)
        begun = time.monotonic()
        why = _boot(
            [  # dies with us, however we die; never kvm, which may be there and hang
                *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),
                *("-accel", "tcg,thread=single", "-cpu", "max", "-smp", str(cpus), "-m", MEMORY),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", f"file:{console}"),
                *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", _COMMAND_LINE),
                *("-drive", f"file={image.root},format=raw,if=virtio,cache=unsafe,snapshot={'off' if keep else 'on'}"),
                *_disk(folder / "job", read_only=True),
                *_disk(folder / "results"),
            ],
            console,
            total_s,
        )
        return _result(image, folder, why, time.monotonic() - begun)


def _boot(command: Sequence[str], console: Path, total_s: float) -> str:
    """Runs QEMU to its end; why it was ended early, or empty."""
    qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline, spoke, said = time.monotonic() + total_s, time.monotonic(), 0
    try:
        while True:
            try:
                _, error = qemu.communicate(timeout=1)
                return error.decode(errors="replace").strip() if qemu.returncode else ""
            except subprocess.TimeoutExpired:
                pass
            now, size = time.monotonic(), console.stat().st_size if console.exists() else 0
            if size != said:
                spoke, said = now, size
            if now > deadline:
                return f"no end within {total_s:.0f} s"
            if now - spoke > SILENCE_S:
                return f"silent for {SILENCE_S} s"
    finally:
        qemu.kill()
        qemu.wait()


def _result(image: Image, folder: Path, why: str, total_s: float) -> Result:
    files: dict[str, str] = {}
    try:
        with tarfile.open(folder / "results", "r:") as archive:
            for entry in archive:
                stream = archive.extractfile(entry)
                if stream:
                    files[entry.name.removeprefix("./")] = stream.read().decode(errors="replace")
    except tarfile.TarError:
        pass  # nothing was written, or half of it: the console tells why
    lost = None
    if "end" not in files:
        try:
            tail = (folder / "console").read_text(errors="replace").splitlines()[-40:]
        except OSError:
            tail = []
        reason = f"the guest {image.guest.name} was lost ({why or 'it stopped'}); its last words:"
        lost = GuestLost("\n".join([reason, *tail]))
    statuses = {name.removesuffix(".status"): int(text) for name, text in files.items() if name.endswith(".status")}
    return Result(statuses, files, lost, float(files.get("boot", "nan")), total_s)
