# SPDX-License-Identifier: Apache-2.0
"""biolatency against the kernel's own account, `/sys/block/<disk>/stat`, on loop devices of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daemon.histogram import BYTES, SECONDS
from daemon.model import Distribution
from tests.accuracy import compared
from tests.kernel import load as loads
from tests.kernel.load import Disk, DiskStat

pytestmark = pytest.mark.kernel

DURATION = "bpf_block_io_duration_seconds"
QUEUE = "bpf_block_io_queue_duration_seconds"
SIZE = "bpf_block_io_size_bytes"
ERRORS = "bpf_block_io_errors"
SECTOR = 512
BEYOND = 8 << 20  # a place behind the end of a file cut to 4 MiB


@pytest.fixture
def disks(tmp_path: Path, lacks: Callable[[str], None]) -> Iterator[Callable[..., Disk]]:
    """Each call gives a loop device (`loads.loop_device`); all are gone afterwards."""
    for tool, package in (("losetup", "mount"), ("blkdiscard", "util-linux")):
        if shutil.which(tool) is None:
            lacks(f"{tool} is not installed; apt install {package}")
    with ExitStack() as stack:
        numbers = iter(range(100))
        yield lambda **how: stack.enter_context(loads.loop_device(tmp_path / f"disk{next(numbers)}", **how))


@pytest.fixture
def fio(lacks: Callable[[str], None]) -> Callable[..., Any]:
    """Direct I/O on a disk, with more options as they stand on fio's command line; what fio tells of its one job."""
    if shutil.which("fio") is None:
        lacks("fio is not installed; apt install fio")

    def run(disk: Disk, *options: str) -> Any:
        common = ("--name=load", f"--filename={disk.path}", "--direct=1", "--ioengine=libaio", "--output-format=json")
        done = subprocess.run(["fio", *common, *options], check=True, capture_output=True)
        return json.loads(done.stdout)["jobs"][0]

    return run


@dataclass(frozen=True)
class Counted:
    """What a load added: the kernel's account, and ours by operation (duration, queue, size)."""

    kernel: DiskStat
    ours: dict[str, tuple[Distribution, Distribution, Distribution]]

    def counts(self) -> dict[str, int]:
        """By operation; that the three histograms agree is asserted on the way."""
        for duration, queue, size in self.ours.values():
            assert duration.count == queue.count == size.count
        return {operation: duration.count for operation, (duration, _, _) in self.ours.items() if duration.count}

    def bytes(self) -> dict[str, int]:
        return {operation: round(size.sum) for operation, (_, _, size) in self.ours.items() if size.sum}

    def expected_counts(self) -> dict[str, int]:
        """The request that asks for a flush is to the kernel a write of no bytes besides the flush; to us it is not."""
        kernel = self.kernel
        counts = {
            "read": kernel.reads, "write": kernel.writes - kernel.flushes, "discard": kernel.discards,
            "flush": kernel.flushes,
        }  # fmt: skip
        return {operation: count for operation, count in counts.items() if count}

    def expected_bytes(self) -> dict[str, int]:
        kernel = self.kernel
        sectors = {"read": kernel.read_sectors, "write": kernel.write_sectors, "discard": kernel.discard_sectors}
        return {operation: count * SECTOR for operation, count in sectors.items() if count}


def minus(after: Distribution, before: Distribution) -> Distribution:
    cumulative = tuple(a - b for a, b in zip(after.cumulative, before.cumulative, strict=True))
    return Distribution(cumulative, after.count - before.count, after.sum - before.sum)


def count(loaded: Any, disk: Disk, load: Callable[[], None]) -> Counted:
    """Runs a load and gives what it added; again where the kernel kept some of it from BPF (see `loads.witness`)."""

    def read() -> tuple[DiskStat, dict[str, tuple[Distribution, ...]]]:
        families = loaded.read()
        scales = ((DURATION, SECONDS), (QUEUE, SECONDS), (SIZE, BYTES))
        found = [{series.labels: series.value for series in families[name].series} for name, _ in scales]
        empties = [scale.empty for _, scale in scales]
        operations = [operation for device, operation in found[0] if device == disk.name]
        ours = {
            operation: tuple(one.get((disk.name, operation), empty) for one, empty in zip(found, empties, strict=True))
            for operation in operations
        }
        return disk.stat(), ours

    with loads.witness(disk) as seen:
        for _ in range(5):
            (kernel_before, before), seen_before = read(), seen()
            load()
            (kernel_after, after), seen_after = read(), seen()
            kernel = kernel_after.since(kernel_before)
            assert kernel_after.in_flight == 0
            nothing = (SECONDS.empty, SECONDS.empty, BYTES.empty)
            ours = {
                operation: tuple(map(minus, values, before.get(operation, nothing)))
                for operation, values in after.items()
            }
            reading, writing = (now - then for now, then in zip(seen_after, seen_before, strict=True))
            if (reading, writing) == (kernel.reads, kernel.writes + kernel.discards):
                return Counted(kernel, ours)  # type: ignore[arg-type]
    pytest.fail("in five attempts the kernel did not once let BPF see all completions")


def matches(loaded: Any, counted: Counted) -> None:
    compared(loaded, "requests", sum(counted.counts().values()), sum(counted.expected_counts().values()))
    compared(loaded, "bytes", sum(counted.bytes().values()), sum(counted.expected_bytes().values()))
    assert counted.counts() == counted.expected_counts()
    assert counted.bytes() == counted.expected_bytes()
    assert not any(loaded.losses().values())


def nothing_under_way(loaded: Any) -> bool:
    """The map is the whole machine's, so other disks may have requests under way now and then."""
    for _ in range(1000):
        if loaded.engine.status()["collectors"]["biolatency"]["maps"]["inflight"]["entries"] == 0:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("forbid", ["", "tp_btf"], ids=["tp_btf", "raw_tp"])
def test_counts_and_bytes_are_the_kernels(load, disks, forbid: str) -> None:
    disk = disks()
    loaded = load("biolatency", forbid=forbid)
    status = loaded.engine.status()["collectors"]["biolatency"]
    wanted = "raw_tp" if forbid else "tp_btf"
    assert {one["hook"].split(":")[0] for one in status["programs"].values()} == {wanted}

    def one_of_each() -> None:
        disk.read(200)
        disk.read(3, size=4 << 20)  # more than a request may hold
        disk.read(50, size=SECTOR)
        disk.write(100)
        disk.write(20, size=192 << 10)
        disk.flush(7)
        disk.discard(30)

    counted = count(loaded, disk, one_of_each)
    matches(loaded, counted)
    assert counted.counts()["flush"] == 7
    assert counted.counts()["discard"] == 30
    assert nothing_under_way(loaded)


def test_tools_counts_are_the_kernels(load, disks) -> None:
    disk = disks()
    loaded = load("biolatency")

    def dd_and_blkdiscard() -> None:
        for source, target, flag in ((disk.path, "/dev/null", "iflag"), ("/dev/zero", disk.path, "oflag")):
            command = ["dd", f"if={source}", f"of={target}", "bs=64k", "count=100", f"{flag}=direct", "conv=nocreat"]
            subprocess.run(command if source != disk.path else command[:-1], check=True, capture_output=True)
        subprocess.run(["blkdiscard", "--length", "1M", disk.path], check=True)

    matches(loaded, count(loaded, disk, dd_and_blkdiscard))


@pytest.mark.parametrize("depth", [1, 32])
def test_counts_at_depth_are_the_kernels(load, disks, fio: Callable[..., Any], depth: int) -> None:
    disk = disks()
    loaded = load("biolatency")
    shape = (f"--iodepth={depth}", "--bsrange=512-256k", "--number_ios=4000")
    matches(loaded, count(loaded, disk, lambda: fio(disk, "--rw=randrw", *shape)))
    matches(loaded, count(loaded, disk, lambda: fio(disk, "--rw=randtrim", "--number_ios=200", "--bs=64k")))
    matches(loaded, count(loaded, disk, lambda: fio(disk, "--rw=write", "--bs=4k", *shape[::2])))  # merges
    assert nothing_under_way(loaded)


@pytest.mark.parametrize(("operation", "how"), [("read", "randread"), ("write", "randwrite")])
def test_queue_and_device_time_are_the_kernels_ticks(
    load, disks, fio: Callable[..., Any], operation: str, how: str
) -> None:
    """The kernel takes a request's end after the programs there ran and its bios ended: its time is the longer one, by
    some 10 us for a request of 32 pages. So the queue is kept full, and each request takes much longer than that.
    """
    disk = disks()
    loaded = load("biolatency", exemplars="false")
    options = (f"--rw={how}", "--bs=128k", "--iodepth=64", "--runtime=2500ms", "--time_based")
    ours_ms = ticks = 0.0
    for _ in range(4):  # ten seconds in parts, each of which may have to be repeated
        matches(loaded, counted := count(loaded, disk, lambda: fio(disk, *options)))
        duration, queue, _ = counted.ours[operation]
        ours_ms += (duration.sum + queue.sum) * 1000
        ticks += counted.kernel.read_ticks if operation == "read" else counted.kernel.write_ticks
    print(f"{operation}: {ours_ms:.1f} ms, kernel {ticks} ms, {(ours_ms / ticks - 1) * 100:+.3f} %")
    compared(loaded, "queue and device seconds", ours_ms / 1000, ticks / 1000)
    assert ticks * 0.98 < ours_ms < ticks + 4


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_programs_wait_encloses_the_devices_time(load, disks, fio: Callable[..., Any], operation: str) -> None:
    """One request at a time: fio's completion latency is the device's time, and the way there and back."""
    disk = disks()
    loaded = load("biolatency")
    told: dict[str, Any] = {}
    shape = (f"--rw=rand{operation}", "--ioengine=psync", "--bs=4k", "--number_ios=2000")
    matches(loaded, counted := count(loaded, disk, lambda: told.update(fio(disk, *shape))))
    duration, queue, _ = counted.ours[operation]
    assert duration.count == told[operation]["total_ios"] == 2000
    assert 0 < duration.sum + queue.sum < told[operation]["clat_ns"]["mean"] / 1e9 * 2000


def test_requests_that_fail_are_counted_by_error(load, disks) -> None:
    """Reads behind the end of the backing file. One read across it comes in two parts, with a requeue between."""
    disk = disks(direct=True)
    loaded = load("biolatency")
    assert loaded.series(ERRORS).get((disk.name, "read", "ioerr"), 0) == 0
    os.truncate(disk.file, (4 << 20) + 3 * SECTOR)
    counted = count(loaded, disk, lambda: disk.read(13, first=BEYOND))
    before = loaded.series(ERRORS)[disk.name, "read", "ioerr"]
    assert before % 13 == 0  # of each attempt
    matches(loaded, counted)

    counted = count(loaded, disk, lambda: disk.read(1, size=8192, first=4 << 20))
    assert counted.counts() == {"read": 1}
    matches(loaded, counted)
    assert counted.bytes() == {"read": 8192}
    assert [labels for labels in loaded.series(ERRORS) if labels[0] == disk.name] == [(disk.name, "read", "ioerr")]
    assert loaded.series(ERRORS)[disk.name, "read", "ioerr"] > before
    assert nothing_under_way(loaded)


def test_exemplars_name_who_read_what(load, disks) -> None:
    disk = disks()
    loaded = load("biolatency", exemplar_interval="1s")
    disk.read(5, size=8192, first=1 << 20)
    began = time.time()
    comm = Path("/proc/self/comm").read_text().strip()
    sectors = {str((1 << 20) // SECTOR + number * 16) for number in range(5)}
    for metric, scale in ((DURATION, SECONDS), (QUEUE, SECONDS), (SIZE, BYTES)):
        distribution = loaded.series(metric)[disk.name, "read"]
        filled = [
            bucket
            for bucket, (below, upto) in enumerate(
                zip((0, *distribution.cumulative), (*distribution.cumulative, distribution.count), strict=True)
            )
            if upto > below
        ]
        assert sorted(distribution.exemplars) == filled
        for bucket, exemplar in distribution.exemplars.items():
            labels = dict(exemplar.labels)
            assert (labels["pid"], labels["comm"]) == (str(os.getpid()), comm)
            assert labels["sector"] in sectors
            assert scale.octave(round(exemplar.value * scale.unit)) == bucket
            assert abs(exemplar.timestamp - began) < 60
    assert [exemplar.value for exemplar in loaded.series(SIZE)[disk.name, "read"].exemplars.values()] == [8192]


def test_an_exemplar_stays_for_its_interval(load, disks) -> None:
    disk = disks()
    loaded = load("biolatency", exemplar_interval="1h")
    for first in (0, 4096):
        disk.read(1, first=first)
        size = loaded.series(SIZE)[disk.name, "read"]
        (exemplar,) = size.exemplars.values()
        assert dict(exemplar.labels)["sector"] == "0"
    assert size.count == 2


def test_another_disk_stays_out(load, disks) -> None:
    ours, other = disks(), disks()
    loaded = load("biolatency")
    quiet = other.stat()
    matches(loaded, count(loaded, ours, lambda: ours.read(100)))
    assert other.stat() == quiet
    assert other.name not in {device for device, _ in loaded.series(DURATION)}


def test_a_disk_too_many_counts_in_other(load, disks) -> None:
    """One place: whoever comes first has all of its operations there, and all of everybody else's are in `other`."""
    pair = (disks(direct=True), disks(direct=True))
    loaded = load("biolatency", max_devices=1)
    before = {disk.name: disk.stat() for disk in pair}
    for disk in pair:
        disk.read(11)
        disk.write(7)
        disk.discard(5)
        disk.flush(3)
    for disk in pair:
        os.truncate(disk.file, 4 << 20)
        assert disk.read(2, first=BEYOND) == 2
    sizes, errors = loaded.series(SIZE), loaded.series(ERRORS)
    names = {device for device, _ in sizes}
    (named,) = names - {"other"}  # a journal may have written to the machine's own disk first
    assert {device for device, _, _ in errors} <= {named, "other"}
    delta = {disk.name: disk.stat().since(before[disk.name]) for disk in pair}
    inside = {disk.name for disk in pair} & {named}
    for operation, field in (("read", "reads"), ("discard", "discards"), ("flush", "flushes")):
        if inside:
            assert sizes[named, operation].count == getattr(delta[named], field)
        outside = sum(getattr(stat, field) for name, stat in delta.items() if name not in inside)
        assert sizes["other", operation].count >= outside
    assert sum(errors.values()) >= 4
    maps = loaded.engine.status()["collectors"]["biolatency"]["maps"]
    assert maps["disks"] | {"memory_bytes": 0} == {"entries": 1, "max_entries": 1, "memory_bytes": 0}
    assert not any(loaded.losses().values())


def test_without_iostats_the_queue_time_is_not_known(load, disks) -> None:
    """`queue/iostats` 0: the kernel then does not set a request's start time, or leaves that of an earlier request."""
    disk = disks()
    loaded = load("biolatency")
    disk.read(10)
    switch = Path(f"/sys/block/{disk.name}/queue/iostats")
    switch.write_text("0")
    try:
        disk.read(10)
    finally:
        switch.write_text("1")
    assert loaded.series(DURATION)[disk.name, "read"].count == 20
    assert loaded.series(QUEUE)[disk.name, "read"].count == 10
