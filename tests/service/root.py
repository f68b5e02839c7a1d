# SPDX-License-Identifier: Apache-2.0
"""A Debian root file system without bpfmetricsd, and with the packages that it depends on ready for apt to install.

Those that it is built with lie there too. It is made from the mirror that the host's apt uses and kept in a cache;
containers only ever use it as a lower layer.
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.vm.images import KEYRING, CannotBuildError, apt_options, mirror

CACHE = "BPFMETRICSD_SERVICE_CACHE"
DEFAULT_CACHE = Path("/var/cache/bpfmetricsd-service")
SUITE = "bookworm"
LATER = ("trixie", "forky")  # Debian 13 and testing
PACKAGES = ("systemd-sysv", "dbus", "curl")
BUILDERS = ("debhelper", "dh-python", "dpkg-dev")
PROJECT = Path(__file__).resolve().parents[2]
CONTROL = PROJECT / "packaging/debian/control"
TOOLS = {
    "systemd-nspawn": "systemd-container", "mmdebstrap": "mmdebstrap", "dpkg-buildpackage": "dpkg-dev",
    "dh": "debhelper", "dh_python3": "dh-python", "nsenter": "util-linux", "ip": "iproute2",
}  # fmt: skip
_SECONDS = 600


def missing_tools() -> list[str]:
    """Debian packages that the host lacks."""
    found = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    return found + ([] if KEYRING.exists() else ["debian-archive-keyring"])


def depends(control: str) -> list[str]:
    """The packages that the .deb needs or recommends, without versions."""
    fields = re.findall(r"^(?:Depends|Recommends):((?:.*\n)(?: .*\n)*)", control, re.MULTILINE)
    words = [word.strip() for field in fields for word in field.split(",")]
    return ["python3", *(word for word in words if word and not word.startswith("$"))]


def build(suite: str = SUITE) -> Path:
    """The folder, from the cache or anew. Raises `CannotBuildError`."""
    cache = Path(os.environ.get(CACHE) or DEFAULT_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    wanted = [*depends(CONTROL.read_text()), *BUILDERS]
    recipe = hashlib.sha256(repr((inspect.getsource(_make), PACKAGES, wanted)).encode()).hexdigest()[:12]
    root = cache / f"root-{suite}-{recipe}"
    with open(cache / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in cache.glob("root-*"):
            if not path.name.endswith(recipe):
                shutil.rmtree(path)
        if not root.exists():
            with tempfile.TemporaryDirectory(prefix="root-building-", dir=cache) as folder:
                _make(suite, Path(folder) / "made", wanted)
                (Path(folder) / "made").rename(root)
    return root


def build_packages(suite: str, root: Path, into: Path, higher: str) -> None:
    """The package into the folder `into`, and one of a `higher` version into its `next`, from the checkout.

    They are built by the tools of the suite: by the host's where it is of that suite, otherwise inside of the root.
    """
    script, checkout, out = _BUILD, "/checkout", "/out"
    command = [
        *("systemd-nspawn", "--quiet", f"--directory={root}", "--volatile=overlay", "--register=no", "--keep-unit"),
        *(f"--machine=bpfmetricsd-build-{os.getpid()}", "--pipe", "--private-network", "--timezone=off"),
        *("--resolv-conf=off", "--link-journal=no", f"--bind-ro={PROJECT}:{checkout}", f"--bind={into}:{out}"),
    ]
    if platform.freedesktop_os_release().get("VERSION_CODENAME") == suite:
        script, checkout, out, command = _BUILD_HERE, str(PROJECT), str(into), []
    done = subprocess.run(
        [*command, "sh", "-ec", script, "sh", checkout, out, higher],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"the package does not build on {suite}:\n{done.stdout}{done.stderr}")


_BUILD_HERE = """\
"$1/packaging/build-deb" -o "$2"
"$1/packaging/build-deb" -o "$2/next" -V "$3"
"""
_BUILD = f"""\
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
apt-get install -y -q --no-install-recommends {" ".join(BUILDERS)} >/tmp/log 2>&1 || {{ cat /tmp/log; exit 1; }}
{_BUILD_HERE}"""


def install(tree: Path, packages: Path) -> None:
    """Installs the package of a folder into a tree that is not running; apt leaves nothing else there."""
    done = subprocess.run(
        [
            *("systemd-nspawn", "--quiet", f"--directory={tree}", "--register=no", "--keep-unit", "--pipe"),
            *(f"--machine=bpfmetricsd-install-{os.getpid()}", "--private-network", "--timezone=off"),
            *("--resolv-conf=off", "--link-journal=no", f"--bind-ro={packages}:/packages"),
            *("sh", "-ec", _INSTALL),
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS,
    )  # fmt: skip
    if done.returncode:
        raise AssertionError(f"the package does not install:\n{done.stdout}{done.stderr}")


_INSTALL = """\
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
apt-get install -y -q --no-install-recommends /packages/*.deb
rm -rf /var/cache/apt /var/lib/apt/lists
"""


def _make(suite: str, tree: Path, wanted: list[str]) -> None:
    archives = 'rm -f "$1"/var/cache/apt/archives/*.deb'
    download = f'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get install -y --download-only {" ".join(wanted)}'
    command = [
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", f"--keyring={KEYRING}"),
        *(f"--include={','.join(PACKAGES)}", '--aptopt=APT::Install-Recommends "false"'),
        '--aptopt=APT::Keep-Downloaded-Packages "true"', "--dpkgopt=path-exclude=/usr/share/locale/*",
        *(f"--aptopt={line.rstrip(';')}" for line in apt_options()),
        *("--skip=cleanup/apt", f"--customize-hook={archives}", f"--customize-hook={download}"),
        *(suite, str(tree), mirror(suite)),
    ]  # fmt: skip
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        said = "; ".join(done.stderr.strip().splitlines()[-5:])
        raise CannotBuildError(f"mmdebstrap failed: {said}")
