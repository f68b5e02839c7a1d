# SPDX-License-Identifier: Apache-2.0
"""The package under a real systemd, as an operator lives with it; in this order, from installing it to purging it.

On Debian 12, and on the later ones where other systems are booted too (`make test-vm`).
"""

from __future__ import annotations

import contextlib
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import collectors
from collectors import oomkill
from daemon import __version__
from tests.service.conftest import AFTER_NEXT, CHANGED, NEXT, SUITES, blocks
from tests.service.machine import PORT, THEIRS, Machine, remove_group, wait_for

pytestmark = [pytest.mark.service, SUITES]

SERVER, LOADER, SOCKET = "bpfmetricsd.service", "bpfmetricsd-load.service", "bpfmetricsd.socket"
CONFIG = "/etc/bpfmetricsd/bpfmetricsd.yaml"
PINS = "/sys/fs/bpf/bpfmetricsd"
BASE = f'server: {{listen: ":{PORT}"}}\ncollectors: {{{", ".join(f"{one.name}: {{}}" for one in collectors.ALL)}}}\n'
BROKEN_SOURCE = "/usr/lib/bpfmetricsd/bpf/cachestat.bpf.c"
RSS_KIB = 32 * 1024
WAITS = "bpf_run_queue_latency_seconds_count"  # never stands still


def up(samples: dict[str, float]) -> dict[str, float]:
    prefix = 'bpfmetricsd_collector_up{collector="'
    return {key.removeprefix(prefix)[:-2]: value for key, value in samples.items() if key.startswith(prefix)}


def started(samples: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in samples.items() if key.startswith("bpfmetricsd_collector_started")}


def status_text(machine: Machine) -> str:
    return machine.show(SERVER, "StatusText")


def all_up(machine: Machine) -> dict[str, float]:
    """The samples of a scrape, once all six collectors are up."""

    def look() -> dict[str, float]:
        samples = machine.scrape()
        found = up(samples)
        return samples if len(found) == len(collectors.ALL) and all(found.values()) else {}

    samples: dict[str, float] = wait_for(look, f"six collectors up; status: {status_text(machine)}")
    return samples


def pinned(machine: Machine) -> list[str]:
    """What lies in the machine's /sys/fs/bpf; the kernel puts two files of its own there."""
    return [path.name for path in machine.bpffs.iterdir() if not path.name.endswith(".debug")]


@pytest.fixture
def machine(installed: Machine) -> Machine:
    """With all six collectors up, and reachable from the host."""
    one = installed
    one.run("rm", "-rf", f"/run/systemd/system/{SERVER}.d")
    one.write(CONFIG, BASE)
    one.run("systemctl", "daemon-reload")
    one.run("systemctl", "start", LOADER, SERVER)
    one.run("systemctl", "reload", SERVER)
    try:
        one.scrape()
    except OSError:
        one.run("systemctl", "restart", SERVER)
    all_up(one)
    return one


@pytest.fixture(scope="module")
def installed(computer: Machine, deb: Path) -> Machine:
    """Installed by apt, which finds all that it needs among Debian's packages and starts the units."""
    computer.run("apt", "install", f"/packages/{deb.name}")
    return computer


def goes_on(machine: Machine, before: dict[str, float]) -> dict[str, float]:
    """The samples of a later scrape: no collector began anew, nothing was forgotten, and there is more."""
    after = all_up(machine)
    assert started(after) == started(before)
    assert after[WAITS] >= before[WAITS] > 0
    wait_for(lambda: machine.scrape()[WAITS] > before[WAITS], "more waits for a CPU")
    return after


def test_apt_installs_and_starts_it(installed: Machine) -> None:
    assert installed.run("systemctl", "is-active", SERVER, LOADER).stdout.split() == ["active", "active"]
    assert installed.run("systemctl", "is-enabled", SERVER, LOADER).stdout.split() == ["enabled", "enabled"]
    every = len(collectors.ALL)
    wait_for(lambda: status_text(installed) == f"{every} of {every} collectors up", "the status")
    page = installed.run("curl", "-sS", f"http://127.0.0.1:{PORT}/metrics").stdout
    assert page.count("\nbpfmetricsd_collector_up{") == len(collectors.ALL)


def test_systemd_finds_no_fault_in_the_units(installed: Machine) -> None:
    units = [f"/lib/systemd/system/{unit}" for unit in (SERVER, LOADER, SOCKET)]
    said = installed.run("systemd-analyze", "verify", "--man=no", *units).stdout
    assert "bpfmetricsd" not in said


def test_metrics_are_seen_from_outside(machine: Machine) -> None:
    assert set(up(all_up(machine))) == set(collectors.BY_NAME)


def test_the_server_holds_no_privilege_and_little_memory(machine: Machine) -> None:
    for _ in range(5):
        machine.scrape()
    status = machine.proc()
    assert "0" not in status["Uid"].split()
    assert status["Groups"].split() == status["Gid"].split()[:1]
    assert {status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert int(status["VmRSS"].split()[0]) <= RSS_KIB
    assert machine.scrape()["process_resident_memory_bytes"] > 0


def test_only_root_and_the_group_may_read_the_pins(machine: Machine) -> None:
    listing = machine.run("find", PINS, "-printf", "%m %u %g\n").stdout.split("\n")
    assert {line for line in listing if line} == {
        "750 root bpfmetricsd", "640 root bpfmetricsd", "660 root bpfmetricsd",
    }  # fmt: skip
    seen = machine.run("runuser", "-u", "nobody", "--", "ls", PINS, check=False)
    assert seen.returncode != 0


def signal_server(machine: Machine, name: str) -> None:
    machine.run("systemctl", "kill", "--kill-whom=main", f"--signal={name}", SERVER)


def test_a_killed_server_comes_back_and_counts_go_on(machine: Machine) -> None:
    before, pid = machine.scrape(), machine.pid()
    signal_server(machine, "KILL")
    wait_for(lambda: machine.pid() not in ("0", pid), "another server")
    goes_on(machine, before)


def test_the_watchdog_replaces_a_server_that_hangs(machine: Machine) -> None:
    machine.write(f"/run/systemd/system/{SERVER}.d/watchdog.conf", "[Service]\nWatchdogSec=2s\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", SERVER)
    before, pid = all_up(machine), machine.pid()
    signal_server(machine, "STOP")
    wait_for(lambda: machine.pid() not in ("0", pid), "another server")
    goes_on(machine, before)
    assert "Watchdog timeout" in machine.run("journalctl", "-q", "-u", SERVER, "-n", "30").stdout


def test_a_restart_loses_no_count(machine: Machine) -> None:
    before, pid = machine.scrape(), machine.pid()
    machine.run("systemctl", "restart", SERVER)
    assert machine.pid() != pid
    goes_on(machine, before)


def test_counting_goes_on_without_a_server(machine: Machine) -> None:
    before = machine.scrape()
    machine.run("systemctl", "stop", SERVER)
    assert machine.run("systemctl", "is-active", LOADER).stdout.strip() == "active"
    machine.run("systemctl", "start", SERVER)
    goes_on(machine, before)


def test_a_reload_applies_the_configuration(machine: Machine) -> None:
    before, pid = machine.scrape(), machine.pid()
    machine.write(CONFIG, BASE.replace("cachestat: {}, ", "").replace("tcpretrans: {}", "tcpretrans: {events: true}"))
    machine.run("systemctl", "reload", SERVER)
    wait_for(lambda: set(up(machine.scrape())) == set(collectors.BY_NAME) - {"cachestat"}, "no cachestat")
    after = machine.scrape()
    assert machine.run("ls", PINS).stdout.split() == sorted(set(collectors.BY_NAME) - {"cachestat"})
    assert machine.run("ls", f"{PINS}/tcpretrans/maps").stdout.split().count("events") == 1
    assert machine.pid() == pid
    assert after[WAITS] > before[WAITS]


def test_the_server_finds_the_names_of_cgroups(machine: Machine) -> None:
    machine.write(CONFIG, BASE.replace("runqlat: {}", "runqlat: {by: cgroup}"))
    machine.run("systemctl", "reload", SERVER)
    wanted = f'{WAITS}{{cgroup="/system.slice/{SERVER}"}}'
    wait_for(lambda: wanted in machine.scrape(), wanted)


def test_programs_load_on_other_kinds_of_hooks(machine: Machine) -> None:
    """With the few capabilities of the loader's unit. What no container has is in tests/vm/test_boot.py."""
    drop_in = f"/run/systemd/system/{LOADER}.d/hooks.conf"
    try:
        machine.write(drop_in, "[Service]\nEnvironment=BPFMETRICSD_FORBID=tp_btf\n")
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "reload", LOADER)
        hooks = "".join(machine.scrape())
        assert 'hook="raw_tp:' in hooks
        assert 'hook="tp_btf:' not in hooks
    finally:
        machine.run("rm", "-r", str(Path(drop_in).parent))


def test_passwords_are_checked(machine: Machine) -> None:
    """By a file that the service may read because of its group."""
    bcrypt = pytest.importorskip("bcrypt")
    machine.run("apt", "install", "python3-bcrypt")
    hashed = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()
    machine.write("/etc/bpfmetricsd/web.yaml", f"basic_auth_users: {{prometheus: '{hashed}'}}\n")
    machine.run("chown", "root:bpfmetricsd", "/etc/bpfmetricsd/web.yaml")
    machine.run("chmod", "640", "/etc/bpfmetricsd/web.yaml")
    machine.write(CONFIG, BASE.replace("server: {", "server: {web_config: /etc/bpfmetricsd/web.yaml, "))
    machine.run("systemctl", "restart", SERVER)
    curl = ("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://{THEIRS}:{PORT}/metrics")
    asked = [machine.run(*curl, *user).stdout for user in ((), ("-u", "prometheus:secret"), ("-u", "prometheus:no"))]
    assert asked == ["401", "200", "401"]


@contextlib.contextmanager
def certified(machine: Machine, folder: Path) -> Iterator[ssl.SSLContext]:
    """A certificate and its key in /etc/bpfmetricsd/tls, readable to root; what a client needs to check it."""
    request = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    names = ("-subj", "/CN=test", "-addext", f"subjectAltName=IP:{THEIRS}", "-days", "2")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run([*request, *names, "-out", cert, "-keyout", key], check=True, capture_output=True)
    for path in (cert, key):
        machine.write(f"/etc/bpfmetricsd/tls/{path.name}", path.read_text())
    machine.run("sh", "-c", "chown root:root /etc/bpfmetricsd/tls/*; chmod 600 /etc/bpfmetricsd/tls/*")
    try:
        yield ssl.create_default_context(cafile=str(cert))
    finally:
        machine.run("rm", "-rf", "/etc/bpfmetricsd/tls", f"/run/systemd/system/{SERVER}.d")
        machine.write(CONFIG, BASE)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", SERVER)


TLS = "tls_server_config: {cert_file: cert.pem, key_file: key.pem}\n"


def https(client: ssl.SSLContext) -> str:
    with urllib.request.urlopen(f"https://{THEIRS}:{PORT}/metrics", timeout=10, context=client) as answer:
        return str(answer.read().decode())


def test_https_with_a_key_of_the_services_group(machine: Machine, tmp_path: Path) -> None:
    with certified(machine, tmp_path) as client:
        machine.write("/etc/bpfmetricsd/tls/web.yaml", TLS)
        machine.run("sh", "-c", "chgrp bpfmetricsd /etc/bpfmetricsd/tls/*; chmod 640 /etc/bpfmetricsd/tls/*")
        machine.write(CONFIG, BASE.replace("server: {", "server: {web_config: /etc/bpfmetricsd/tls/web.yaml, "))
        machine.run("systemctl", "restart", SERVER)
        assert "\nbpfmetricsd_collector_up{" in https(client)


def test_https_with_a_key_of_roots(machine: Machine, tmp_path: Path) -> None:
    """systemd reads it and hands it over: no user but root and the service gets to see it."""
    with certified(machine, tmp_path) as client:
        machine.write("/etc/bpfmetricsd/tls/web.yaml", TLS)
        machine.run("chmod", "600", "/etc/bpfmetricsd/tls/web.yaml")
        credentials = "".join(
            f"LoadCredential={name}:/etc/bpfmetricsd/tls/{name}\n" for name in ("web.yaml", "cert.pem", "key.pem")
        )
        machine.write(f"/run/systemd/system/{SERVER}.d/tls.conf", f"[Service]\n{credentials}")
        own = f"/run/credentials/{SERVER}/web.yaml"
        machine.write(CONFIG, BASE.replace("server: {", f"server: {{web_config: {own}, "))
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", SERVER)
        assert "\nbpfmetricsd_collector_up{" in https(client)
        seen = machine.run("runuser", "-u", "bpfmetricsd", "--", "cat", "/etc/bpfmetricsd/tls/key.pem", check=False)
        assert seen.returncode != 0


def test_a_faulty_configuration_fails_to_reload_and_changes_nothing(machine: Machine) -> None:
    before = machine.scrape()
    machine.write(CONFIG, BASE + "intervall: 5s\n")
    assert machine.run("systemctl", "reload", SERVER, check=False).returncode != 0
    assert f"{CONFIG}:3: intervall: unknown key" in machine.log()
    assert machine.run("systemctl", "is-active", SERVER, LOADER).stdout.split() == ["active", "active"]
    goes_on(machine, before)


@contextlib.contextmanager
def broken(machine: Machine) -> Iterator[None]:
    """One collector's program does not compile."""
    machine.run("cp", BROKEN_SOURCE, "/root/kept")
    machine.run("sed", "-i", "$a#error broken by a test", BROKEN_SOURCE)
    try:
        yield
    finally:
        machine.run("mv", "/root/kept", BROKEN_SOURCE)


def test_a_failing_collector_is_named_by_systemctl_status(machine: Machine) -> None:
    machine.run("systemctl", "stop", LOADER)
    with broken(machine):
        machine.run("systemctl", "start", SERVER)
        wait_for(lambda: status_text(machine), "a status")
        text = machine.run("systemctl", "status", "--no-pager", "--full", SERVER).stdout
        assert "5 of 6 collectors up; cachestat: " in text
        assert "broken by a test" in text
        assert {name for name, is_up in up(machine.scrape()).items() if not is_up} == {"cachestat"}
        assert machine.run("bpfmetricsd", "status", check=False).returncode == 1
    machine.run("systemctl", "reload", SERVER)
    all_up(machine)


def test_without_any_place_for_pins_the_loader_fails(machine: Machine) -> None:
    machine.run("systemctl", "stop", LOADER)
    machine.run("mkdir", "-m", "0", PINS)
    machine.run("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", "/sys/fs/bpf")
    try:
        assert machine.run("systemctl", "start", SERVER, check=False).returncode != 0
        assert machine.run("systemctl", "is-active", LOADER, check=False).stdout.strip() == "failed"
    finally:
        machine.run("umount", "/sys/fs/bpf")
        machine.run("rmdir", PINS)


@contextlib.contextmanager
def small_cgroup(name: str, limit: int) -> Iterator[Path]:
    """A memory cgroup of the host, of version 1 or 2."""
    top = Path("/sys/fs/cgroup")
    old = top / "memory"
    group = (old if old.is_dir() else top) / name
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit))
        yield group
    finally:
        remove_group(group)


def test_an_oom_kill_is_in_the_journal_with_every_field(machine: Machine) -> None:
    mebibytes = 48
    command = [sys.executable, "-c", "import sys; sys.stdin.read(1); b'x' * (1 << 30)"]
    with small_cgroup(f"{machine.name}-oom", mebibytes << 20) as group:
        victim = subprocess.Popen(command, stdin=subprocess.PIPE)
        (group / "cgroup.procs").write_text(str(victim.pid))
        victim.communicate(b"x")
    assert victim.returncode == -9
    wanted = (f"MESSAGE_ID={oomkill.MESSAGE_ID}", f"BPF_PID={victim.pid}")
    (entry,) = wait_for(lambda: machine.entries(*wanted), "the journal entry")
    assert entry["SYSLOG_IDENTIFIER"] == "bpfmetricsd"
    assert entry["_SYSTEMD_UNIT"] == SERVER
    assert entry["PRIORITY"] == "3"
    assert entry["MESSAGE"].startswith(f"OOM kill: {entry['BPF_COMM']} (pid {victim.pid}) in cgroup ")
    assert entry["BPF_SCOPE"] == "memcg"
    assert entry["BPF_COMM"] == entry["BPF_KILLER_COMM"]
    assert entry["BPF_KILLER_PID"] == str(victim.pid)
    assert entry["BPF_CGROUP"].startswith("/")
    assert "BPF_UNIT" in entry
    parts = [int(entry[f"BPF_{kind}_BYTES"]) for kind in ("ANON", "FILE", "SHMEM")]
    assert int(entry["BPF_RSS_BYTES"]) == sum(parts)
    assert parts[0] > mebibytes << 19
    assert entry["BPF_OOM_SCORE_ADJ"] == "0"
    assert entry["BPF_TIMESTAMP"].endswith("Z")


def is_version(machine: Machine, version: str) -> None:
    """Server and programs."""
    samples = machine.scrape()
    assert any(key.startswith("bpfmetricsd_build_info{") and f'version="{version}"' in key for key in samples)
    assert f'"version": "{version}"' in machine.run("cat", "/run/bpfmetricsd/runqlat.json").stdout


def test_an_upgrade_loses_no_count(machine: Machine) -> None:
    before, pid = machine.scrape(), machine.pid()
    machine.run("sh", "-c", "apt install /packages/next/*.deb")
    assert machine.pid() != pid
    goes_on(machine, before)
    is_version(machine, NEXT)
    assert machine.run("cat", CONFIG).stdout == BASE


def test_a_downgrade_loses_no_count(machine: Machine, deb: Path) -> None:
    before, pid = machine.scrape(), machine.pid()
    machine.run("apt", "install", "--allow-downgrades", f"/packages/{deb.name}")
    assert machine.pid() != pid
    goes_on(machine, before)
    is_version(machine, __version__)
    assert machine.run("cat", CONFIG).stdout == BASE


def created(machine: Machine) -> float:
    """Since when the collector counts whose maps will change, as Prometheus is told."""
    url = f"http://127.0.0.1:{PORT}/metrics"
    page = machine.run("curl", "-sS", "-H", "Accept: application/openmetrics-text; version=1.0.0", url).stdout
    (line,) = (line for line in page.splitlines() if line.startswith("bpf_page_cache_misses_created "))
    return float(line.split()[1])


def test_an_upgrade_to_other_maps_begins_their_counts_anew(machine: Machine) -> None:
    """And says so by the time of their creation. Those of the other collectors go on."""
    before, then = started(machine.scrape()), created(machine)
    machine.run("sh", "-c", "apt install /packages/layout/*.deb")
    is_version(machine, AFTER_NEXT)
    after = started(all_up(machine))
    assert {key for key in after if after[key] != before[key]} == {
        f'bpfmetricsd_collector_started_timestamp_seconds{{collector="{CHANGED}"}}'
    }
    assert created(machine) > then


def test_systemd_may_hold_the_socket(machine: Machine) -> None:
    machine.write(CONFIG, BASE.replace(f'":{PORT}"', "fd://"))
    drop_in = f"/run/systemd/system/{SOCKET}.d/address.conf"
    machine.write(drop_in, f"[Socket]\nListenStream=\nListenStream={THEIRS}:{PORT}\n")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "stop", SERVER)
    machine.run("systemctl", "start", SOCKET)
    try:
        all_up(machine)  # which starts the server
        assert machine.run("systemctl", "is-active", SERVER).stdout.strip() == "active"
    finally:
        machine.run("systemctl", "stop", SOCKET, SERVER)
        machine.run("rm", "-r", str(Path(drop_in).parent))


def test_stopping_the_loader_detaches_the_programs(machine: Machine) -> None:
    machine.run("systemctl", "stop", LOADER)
    assert machine.run("systemctl", "is-active", SERVER, LOADER, check=False).stdout.split() == ["inactive", "inactive"]
    assert pinned(machine) == []
    assert machine.run("ls", "-d", "/run/bpfmetricsd", check=False).returncode != 0


def test_stopping_the_loader_detaches_also_with_a_faulty_configuration(machine: Machine) -> None:
    machine.write(CONFIG, "nonsense")
    said = machine.run("bpfmetricsd", "unload", "--only", "oomkill").stdout
    assert said.endswith(
        "going on with /sys/fs/bpf/bpfmetricsd and /run/bpfmetricsd, which are the default\nunloaded oomkill\n"
    )
    machine.run("systemctl", "stop", LOADER)
    assert pinned(machine) == []


def test_purging_leaves_nothing(machine: Machine) -> None:
    machine.run("apt", "purge", "bpfmetricsd")
    assert pinned(machine) == []
    find = ("find", "/", "/run", "/tmp", "/var/tmp", "-xdev", "-iname", "*bpfmetricsd*", "-not", "-path", "/packages/*")
    assert machine.run(*find).stdout.split() == []
    assert "bpfmetricsd" not in machine.run("getent", "passwd").stdout + machine.run("getent", "group").stdout
    assert "bpfmetricsd" not in machine.run("systemctl", "list-units", "--all", "--no-pager").stdout
    assert "bpfmetricsd" not in machine.run("sh", "-c", "cat /proc/[0-9]*/comm").stdout


def test_the_commands_of_the_operators_manual_work(computer: Machine) -> None:
    """All of them in their order, on a machine without the package: the first installs it, the last removes it."""
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert commands[-1] == "apt purge bpfmetricsd"
    for line in commands:
        if line == f"systemctl enable --now {SOCKET}":  # the text before it says so
            computer.write(CONFIG, BASE.replace(f'":{PORT}"', "fd://"))
        computer.run("sh", "-c", line, cwd="/packages")
    assert pinned(computer) == []
