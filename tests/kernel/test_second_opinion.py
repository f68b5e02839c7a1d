# SPDX-License-Identifier: Apache-2.0
"""Another program's view of the same events at the same time: biolatency and runqlat of Debian's libbpf-tools.

Their buckets end at powers of two in microseconds and leave out the end itself; times are cut to whole microseconds.
Ours end at powers of the eighth root of two in seconds. So each of their counts up to an end must lie between ours up
to the bounds around that end. The two programs read the clock one after the other, so a time that lies within
BETWEEN_NS of an end may be on different sides of it: the bounds are taken that much further apart. An interrupt
between the two readings makes the difference larger: that is allowed for one event in a thousand.

What they leave out, and these tests keep out of their loads: a task's waits before they were started; runqlat's `-c`
looks at the cgroup of whoever wakes or switches, not of who waits, so a process is chosen by `-p`; biolatency counts
of one request that is issued twice the second time only, as ours does.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import pytest

from collectors.decoders import text
from daemon.declare import Row
from daemon.histogram import SECONDS
from daemon.reader import open_pins
from tests.kernel import load as loads

pytestmark = pytest.mark.kernel

BETWEEN_NS = 2_000
LAST_US = 1 << 24  # 16 s: both know longer times only as such


@contextmanager
def tool(lacks: Callable[[str], NoReturn], name: str, *options: str) -> Iterator[Callable[[], dict[int, int]]]:
    """Runs a tool; calling it ends the tool and gives, by the end of each bucket in microseconds, its count."""
    path = shutil.which(name, path="/usr/sbin:/usr/bin")
    if path is None:
        lacks(f"{name} is not installed; apt install libbpf-tools")
    process = subprocess.Popen(["stdbuf", "-oL", path, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def end() -> dict[int, int]:
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=10)
        assert process.returncode == 0, errors.decode()
        rows = re.findall(r"^ *(\d+) -> (\d+) *: (\d+) ", out.decode(), re.MULTILINE)
        return {int(last) + 1: int(count) for _, last, count in rows}

    try:
        assert process.stdout
        assert b"Tracing" in process.stdout.readline()
        yield end
    finally:
        process.kill()
        process.communicate()


Pick = Callable[[Row], Mapping[str, Any] | None]  # a table's row to a kernel histogram, None for one that is not meant


def slots(loaded: Any, table: str, pick: Pick) -> list[int]:
    """The kernel histograms' own slots, eight an octave, and overflow; all that are meant together."""
    pins = open_pins(loaded.config.bpffs, loaded.config.state, loaded.name)
    try:
        found = [picked for row in pins.tables([table])[table] if (picked := pick(row))]
    finally:
        pins.close()
    rows = [[0] * (SECONDS.slots + 1), *([*one["slots"], one["overflow"]] for one in found)]
    return [sum(values) for values in zip(*rows, strict=True)]


def agree(ours: Sequence[int], theirs: Mapping[int, int]) -> None:
    """Bucket by bucket, cumulative."""
    assert sum(ours) == sum(theirs.values())
    interrupted = sum(ours) // 1000
    below = [0, *accumulate(ours)]  # below[i]: in the slots before slot i
    told = 0
    for end_us in (1 << power for power in range(1, LAST_US.bit_length())):
        told += theirs.get(end_us, 0)
        low = below[SECONDS.slot(max(0, end_us * 1000 - BETWEEN_NS))]
        high = below[min(SECONDS.slot(end_us * 1000 + BETWEEN_NS) + 1, len(ours))]
        print(f"< {end_us} us: {low} <= {told} <= {high}")
        assert low - interrupted <= told <= high + interrupted


def test_block_io(load: Any, tmp_path: Path, lacks: Callable[[str], NoReturn]) -> None:
    loaded = load("biolatency")
    with loads.loop_device(tmp_path / "disk") as disk, loads.witness(disk) as seen:

        def picked(row: Row) -> Mapping[str, Any] | None:
            return row.value["device"] if text(row.key["disk"]) == disk.name else None

        for _ in range(5):
            before, witnessed = slots(loaded, "block_io", picked), sum(seen())
            with tool(lacks, "biolatency", "-d", disk.name) as end:
                disk.read(1000, 1 << 15)
                disk.write(500, 1 << 16)
                complete = sum(seen()) - witnessed == 1500  # what BPF is not shown (see `loads.witness`) nobody counts
                theirs = end()
            if complete:
                break
        else:
            pytest.fail("in five attempts the kernel did not once let BPF see all completions")
        after = slots(loaded, "block_io", picked)
    ours = [now - then for now, then in zip(after, before, strict=True)]
    assert sum(ours) == 1500
    agree(ours, theirs)


def test_run_queue(load: Any, lacks: Callable[[str], NoReturn]) -> None:
    """One process that is woken 5,000 times, beside one that answers it and others that keep the CPUs busy."""
    loaded = load("runqlat", by="cgroup")
    with ExitStack() as stack:
        (folder, _), (elsewhere, _) = (stack.enter_context(loads.cgroup()) for _ in range(2))
        asking, answering = stack.enter_context(loads.ping_pong(1, 5_000))
        crew = stack.enter_context(loads.crew(folder, [asking]))
        others = stack.enter_context(loads.crew(elsewhere, [answering, loads.burn(1), loads.burn(1)]))
        identity = os.stat(folder).st_ino

        def picked(row: Row) -> Mapping[str, Any] | None:
            return row.value["wait"] if row.key == identity else None

        for _ in range(5):
            before = slots(loaded, "run_queue", picked)
            with tool(lacks, "runqlat", "-p", str(crew.pids[0])) as end:
                kernel = crew.work(others.work)
                theirs = end()
            ours = [now - then for now, then in zip(slots(loaded, "run_queue", picked), before, strict=True)]
            print(f"kernel {kernel.count}, ours {sum(ours)}, theirs {sum(theirs.values())}")
            if sum(ours) == kernel.count:  # else some switch was not shown to BPF (see `loads.witness`)
                break
        else:
            pytest.fail("in five attempts the kernel did not once let BPF see all switches")
    agree(ours, theirs)
