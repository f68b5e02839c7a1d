# SPDX-License-Identifier: Apache-2.0
"""Kernels and root file systems of the guests, made from Debian packages and kept in a cache.

A guest boots a Debian kernel with an initramfs of our own (busybox and a few modules) into a Debian root file system.
Both come from the mirror that the host's apt uses, through apt configurations of their own: the host's are not touched.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import inspect
import lzma
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE = "BPFMETRICSD_VM_CACHE"
DEFAULT_CACHE = Path("/var/cache/bpfmetricsd-vm")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "mkfs.ext4": "e2fsprogs",
    "dpkg-deb": "dpkg", "apt-get": "apt", "zstd": "zstd", "setpriv": "util-linux", "unshare": "util-linux",
}  # fmt: skip
_STEP_TIMEOUT_S = 900
_ROOT_SIZE = "3G"  # sparse: about 0.5 GB on disk


@dataclass(frozen=True, slots=True)
class Guest:
    """A kernel series, the suite it comes from, and the suite of all else (bcc above all)."""

    name: str
    kernel_suite: str
    userland: str


GUESTS = (
    Guest("5.10", "bullseye", "bookworm"),
    Guest("6.1", "bookworm-security", "bookworm"),
    Guest("6.12", "trixie", "trixie"),
    Guest("7.2", "forky", "forky"),
)

PACKAGES = (
    "python3-bpfcc", "libbpf1", "python3-prometheus-client", "python3-yaml", "python3-systemd", "python3-uvicorn",
    "python3-pytest", "python3-hypothesis", "fio", "iptables", "iproute2", "iputils-ping", "xfsprogs", "e2fsprogs",
    "util-linux", "mount", "procps", "kmod",
)  # fmt: skip
_UNPACKED_NOT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")

# The initramfs loads the first row, where `?` marks what not every kernel has. The others are there for the kernel to
# ask for; those that it does not have, or has built in, are left out.
BOOT_MODULES = ("crc32c_generic?", "virtio_pci", "virtio_blk", "ext4")
MODULES = (
    "xfs", "overlay", "loop", "null_blk", "brd", "dm_mod", "dm_delay", "dm_flakey", "scsi_debug",
    "veth", "dummy", "bridge", "sch_netem", "sch_fq", "sch_tbf", "tcp_bbr", "ipv6",
    "ip_tables", "ip6_tables", "iptable_filter", "ip6table_filter", "iptable_nat",
    "iptable_mangle", "ip6table_mangle", "xt_length", "xt_quota",
    "nf_tables", "nft_compat", "nft_counter", "nft_chain_nat", "x_tables",
    "xt_statistic", "xt_tcpudp", "xt_conntrack", "xt_multiport", "xt_limit", "xt_comment",
    "xt_mark", "xt_addrtype", "ipt_REJECT", "ip6t_REJECT", "nf_reject_ipv4", "nft_limit", "nft_numgen",
)  # fmt: skip

_INIT = r"""#!/bin/busybox sh
b=/bin/busybox
lost() { echo "guest: $*"; exec $b sh -c 'echo b >/proc/sysrq-trigger; sleep 60'; }
$b mkdir -p /proc /sys /dev /root
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in $($b cat /boot-modules); do $b insmod "/modules/$module" || lost "insmod $module failed"; done
tries=0
until [ -b /dev/vdc ]; do
	tries=$((tries + 1))
	[ $tries -lt 300 ] || lost "no disk"
	$b sleep 0.1
done
$b mount -t ext4 -o noatime /dev/vda /root || lost "no root file system"
modules=/root/usr/lib/modules/$($b uname -r)
$b mkdir -p "$modules"
$b mount -t tmpfs tmpfs "$modules"
$b cp /modules/* "$modules/"
$b mkdir -p /root/job
$b mount -t tmpfs -o mode=0755 tmpfs /root/job
$b tar -xf /dev/vdb -C /root/job || lost "no job"
for at in proc sys dev; do $b mount -o move "/$at" "/root/$at"; done
exec $b switch_root /root /bin/sh /job/inside
"""


class CannotBuildError(Exception):
    """What the host or the mirror lacks."""


@dataclass(frozen=True, slots=True)
class Image:
    """What QEMU boots. The root file system is shared by guests, so it is only ever used as a snapshot."""

    guest: Guest
    kernel: Path
    initrd: Path
    root: Path


def chosen(names: str) -> tuple[Guest, ...]:
    """Guests by a comma list of names; all of them where it is empty."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {guest.name: guest for guest in GUESTS}
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no guest {name}; known: {', '.join(known)}")
    return tuple(known[name] for name in wanted) or GUESTS


def missing_tools() -> list[str]:
    """Debian packages that the host lacks."""
    found = sorted({package for tool, package in TOOLS.items() if shutil.which(tool) is None})
    return found + ([] if KEYRING.exists() else ["debian-archive-keyring"])


def build(guest: Guest, say: Callable[[str], None] = lambda text: None) -> Image:
    """The image of a guest, from the cache or anew. Raises `CannotBuildError`."""
    cache = Path(os.environ.get(CACHE) or DEFAULT_CACHE)
    root = cache / f"root-{guest.userland}-{_recipe(_make_root)}.ext4"
    kernel = cache / f"kernel-{guest.kernel_suite}-{guest.name}-{_recipe(_make_kernel)}"
    with _alone(cache):
        if not root.exists():
            say(f"making the root file system of {guest.userland} (about a minute)")
            with _new(root) as folder:
                _make_root(guest, folder)
        if not kernel.exists():
            say(f"unpacking the kernel {guest.name} of {guest.kernel_suite}")
            with _new(kernel) as folder:
                _make_kernel(guest, folder)
    return Image(guest, kernel / "vmlinuz", kernel / "initrd", root)


def _recipe(make: Callable[..., None]) -> str:
    """What decides an image: this file's constants, and how it is made."""
    parts = (inspect.getsource(make), PACKAGES, _UNPACKED_NOT, _ROOT_SIZE) if make is _make_root else (
        inspect.getsource(make), BOOT_MODULES, MODULES, _INIT)  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One builder at a time; removes what no recipe makes any more, and what a killed builder left."""
    cache.mkdir(parents=True, exist_ok=True)
    kept = {f"root-{guest.userland}-{_recipe(_make_root)}.ext4" for guest in GUESTS}
    kept |= {f"kernel-{guest.kernel_suite}-{guest.name}-{_recipe(_make_kernel)}" for guest in GUESTS}
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.iterdir():
            if path.name in kept or not path.name.startswith(("root-", "kernel-", "building-")):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        yield


@contextmanager
def _new(path: Path) -> Iterator[Path]:
    """A folder to build in; what lies in its `made` takes the place of `path` in the end."""
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)
        (Path(folder) / "made").rename(path)


def _run(*command: str | Path, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    """A command's output. Raises `CannotBuildError` with the end of what it said."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_STEP_TIMEOUT_S
        )
    except FileNotFoundError as error:
        raise CannotBuildError(f"{command[0]} is missing; install {TOOLS.get(str(command[0]), 'it')}") from error
    except subprocess.TimeoutExpired as error:
        raise CannotBuildError(f"{command[0]} did not end within {_STEP_TIMEOUT_S} s") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-5:]
        raise CannotBuildError(f"{' '.join(map(str, command[:2]))} failed: {'; '.join(said)}")
    return done.stdout.decode(errors="replace")


# The mirror


def mirror(suite: str) -> str:
    """The URL that the host's apt has for Debian, or for its security updates."""
    security = suite.endswith("-security")
    targets = _run("apt-get", "indextargets", "--format", "$(ORIGIN) $(SITE) $(CODENAME)", "Created-By: Packages")
    for line in targets.splitlines():
        origin, site, codename = [*line.split(" "), "", ""][:3]
        if origin == "Debian" and codename.endswith("-security") == security:
            return site
    raise CannotBuildError(
        f"apt knows no mirror for Debian's {suite}; add one to /etc/apt/sources.list.d and run 'apt-get update'"
    )


def apt_options() -> list[str]:
    """How the host's apt fetches (proxy, date checks), as lines of an apt.conf."""
    lines = _run("apt-config", "dump", "Acquire").splitlines()
    wanted = re.compile(r"Acquire::(http|https|Check|Retries|ForceIPv)")
    return [line for line in lines if wanted.match(line)]


class Apt:
    """An apt of its own below `folder`, for one suite."""

    def __init__(self, suite: str, folder: Path) -> None:
        self.folder = folder
        for name in ("lists/partial", "cache/archives/partial", "parts"):
            (folder / name).mkdir(parents=True)
        (folder / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror(suite)} {suite} main\n")
        (folder / "status").touch()
        # Not the host's apt.conf.d: hooks there may remove files of another apt that runs just now.
        settings = {
            "Dir::Etc::parts": f"{folder}/parts", "Dir::Etc::main": "/dev/null", "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::sourcelist": f"{folder}/sources.list", "Dir::State::lists": f"{folder}/lists",
            "Dir::State::status": f"{folder}/status", "Dir::Cache": f"{folder}/cache", "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
        }  # fmt: skip
        lines = [*apt_options(), *(f'{name} "{value}";' for name, value in settings.items())]
        (folder / "apt.conf").write_text("\n".join(lines) + "\n")
        self._environment = os.environ | {"APT_CONFIG": str(folder / "apt.conf")}
        try:
            self._apt("apt-get", "update", "-qq", "--error-on=any")
        except CannotBuildError as error:
            raise CannotBuildError(f"{suite} cannot be had from {mirror(suite)}: {error}") from error

    def _apt(self, *command: str) -> str:
        return _run(*command, cwd=self.folder, environment=self._environment)

    def names(self, prefix: str) -> list[str]:
        return self._apt("apt-cache", "pkgnames", prefix).split()

    def unpack(self, packages: Sequence[str], into: Path) -> None:
        self._apt("apt-get", "download", "-qq", *packages)
        for archive in sorted(self.folder.glob("*.deb")):
            _run("dpkg-deb", "-x", archive, into)
            archive.unlink()


# The root file system


def _make_root(guest: Guest, folder: Path) -> None:
    tree = folder / "tree"
    _run(
        *("unshare", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"),  # nothing of it outlives it
        *("env", f"TMPDIR={folder}", "mmdebstrap"),
        "--mode=root", "--variant=essential", "--format=directory", f"--include={','.join(PACKAGES)}",
        f"--keyring={KEYRING}", '--aptopt=APT::Install-Recommends "false"',
        *(f"--aptopt={line.rstrip(';')}" for line in apt_options()),
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _UNPACKED_NOT),
        guest.userland, tree, mirror(guest.userland),
    )  # fmt: skip
    (tree / "etc/hostname").write_text("guest\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost guest\n::1 localhost\n")
    _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-d", tree, folder / "made", _ROOT_SIZE)


# Kernel, modules, initramfs


def _make_kernel(guest: Guest, folder: Path) -> None:
    made, tree = folder / "made", folder / "tree"
    made.mkdir()
    apt = Apt(guest.kernel_suite, folder / "apt")
    release = newest(apt.names(f"linux-image-{guest.name}."), guest.name)
    # Image, modules and the rest are packages of their own from 7.x on.
    parts = {f"linux-{part}-{release}" for part in ("image", "binary", "modules", "base")}
    apt.unpack(sorted(parts & set(apt.names("linux-"))), tree)
    Apt(guest.userland, folder / "userland").unpack(["busybox-static"], folder / "busybox")
    (vmlinuz,) = [*tree.glob("boot/vmlinuz-*"), *tree.rglob("lib/modules/*/vmlinuz")]
    shutil.copy(vmlinuz, made / "vmlinuz")
    (busybox,) = [path for path in (folder / "busybox").rglob("bin/busybox") if path.is_file()]
    files: list[tuple[str, int, bytes]] = [
        ("bin", 0o40755, b""), ("modules", 0o40755, b""), ("bin/busybox", 0o100755, busybox.read_bytes()),
        ("init", 0o100755, _INIT.encode()),
    ]  # fmt: skip
    (modules,) = [path for path in tree.rglob(f"lib/modules/{release}") if path.is_dir()]
    contents, boot = collect_modules(modules)
    files += [(f"modules/{name}.ko", 0o100644, data) for name, data in contents.items()]
    files += [(f"modules/{path.name}", 0o100644, path.read_bytes()) for path in modules.glob("modules.*")]
    files.append(("boot-modules", 0o100644, "".join(f"{name}.ko\n" for name in boot).encode()))
    (made / "initrd").write_bytes(gzip.compress(cpio(files), 1))


def newest(names: Sequence[str], series: str) -> str:
    """`linux-image-6.1.0-56-amd64` is newer than `-9-amd64`; other flavours and unsigned images are not wanted."""
    pattern = re.compile(rf"linux-image-({re.escape(series)}\.[^-]+(?:-\d+)?-amd64)")
    found = [match.group(1) for name in names if (match := pattern.fullmatch(name))]
    if not found:
        raise CannotBuildError(f"the suite has no kernel {series} any more; see GUESTS in {__file__}")
    return max(found, key=lambda release: [int(number) for number in re.findall(r"\d+", release)])


def collect_modules(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """The wanted modules and what they depend on; of these the names to boot with, dependencies first."""
    paths = {re.sub(r"\.ko.*", "", path.name).replace("-", "_"): path for path in folder.rglob("*.ko*")}
    built_in = {Path(line).stem.replace("-", "_") for line in (folder / "modules.builtin").read_text().split()}
    contents: dict[str, bytes] = {}

    def add(name: str) -> list[str]:
        if name in contents or name not in paths:
            return []
        contents[name] = data = _decompressed(paths[name])
        depends = re.search(rb"\0depends=([^\0]*)", data)
        names = depends.group(1).decode().replace("-", "_").split(",") if depends else []
        soft = re.findall(rb"\0softdep=pre: ([^\0]*)", data)
        names += [one for group in soft for one in group.decode().replace("-", "_").split()]
        return [*(one for name in names for one in add(name)), name]

    for name in BOOT_MODULES:
        if not name.endswith("?") and name not in paths and name not in built_in:
            raise CannotBuildError(f"the kernel in {folder} has no {name}")
    boot = [one for name in BOOT_MODULES for one in add(name.rstrip("?"))]
    for name in MODULES:
        add(name)
    return contents, boot


def _decompressed(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc", path], check=True, stdout=subprocess.PIPE).stdout
    return path.read_bytes()


def cpio(files: Sequence[tuple[str, int, bytes]]) -> bytes:
    """An archive of (name, mode, contents) in the format `newc`, as in the kernel's initramfs documentation."""
    archive = bytearray()
    for number, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


if __name__ == "__main__":
    for each in chosen(",".join(sys.argv[1:])):
        print(build(each, print))
