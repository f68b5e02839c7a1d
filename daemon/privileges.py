# SPDX-License-Identifier: Apache-2.0
"""From root to an ordinary user without capabilities, and the proof that it took; see capabilities(7)."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
from collections.abc import Mapping
from pathlib import Path

from daemon.errors import BpfmetricsdError, UsageError

SERVICE_USER = "bpfmetricsd"
CAP_BPF = 39

_PR_SET_DUMPABLE = 4
_PR_SET_KEEPCAPS = 8
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _CapabilityHeader(ctypes.Structure):
    """struct __user_cap_header_struct"""

    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    """struct __user_cap_data_struct, one for each 32 capabilities"""

    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def default_user() -> str:
    """The user that the package makes, else `nobody`."""
    try:
        return pwd.getpwnam(SERVICE_USER).pw_name
    except KeyError:
        return "nobody"


def drop(user: str, keep_bpf: bool) -> None:
    """Become `user`, for good, with its primary group only and with no capability except CAP_BPF when `keep_bpf`.

    Call it while the process has one thread: capabilities belong to threads. A process that is not root stays
    the user that it is and loses its capabilities. UsageError: no such user, or it is root. BpfmetricsdError:
    something was refused, or did not take.
    """
    root = os.geteuid() == 0
    uid, gid = _ids(user) if root else (os.geteuid(), os.getegid())
    kept = 1 << CAP_BPF if keep_bpf else 0
    try:
        if root:
            _empty_bounding_set(kept)
            _become(uid, gid)
        else:
            kept &= _mask(_status(), "CapPrm")
        _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        _set_capabilities(kept)
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        _prctl(_PR_SET_DUMPABLE, 1)  # changing the user cleared it, and /proc/self belonged to root
    except OSError as error:
        raise BpfmetricsdError(
            f"cannot drop root's privileges to the user {user}: {error.strerror}; start with CAP_SETUID, CAP_SETGID,"
            f" CAP_SETPCAP{' and CAP_BPF' if keep_bpf else ''}, or as an ordinary user"
        ) from None
    problems = leftovers(_status(), uid, gid, kept, root)
    if problems:
        raise BpfmetricsdError(
            f"privileges were dropped and are still there: {', '.join(problems)}; please report this"
        )


def leftovers(status: Mapping[str, str], uid: int, gid: int, kept: int, was_root: bool) -> list[str]:
    """The lines of /proc/self/status that show more than uid, gid and the capabilities `kept`.

    What only root can give up (groups, the bounding set) is expected of a process that was root.
    """
    expected = {"Uid": [str(uid)] * 4, "Gid": [str(gid)] * 4, "NoNewPrivs": ["1"], "Threads": ["1"]}
    if was_root:
        expected["Groups"] = []
    problems = [f"{key} {status.get(key)}" for key, words in expected.items() if status.get(key, "?").split() != words]
    allowed = {"CapInh": 0, "CapPrm": kept, "CapEff": kept, "CapAmb": 0}
    if was_root:
        allowed["CapBnd"] = kept
    return problems + [f"{key} {status.get(key)}" for key, mask in allowed.items() if _mask(status, key) & ~mask]


def _ids(user: str) -> tuple[int, int]:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise UsageError(
            f"there is no user {user}; create it with: useradd --system --shell /usr/sbin/nologin {user}"
        ) from None
    if entry.pw_uid == 0 or entry.pw_gid == 0:
        raise UsageError(f"the user {user} has root's user or group id; name an ordinary user such as nobody")
    return entry.pw_uid, entry.pw_gid


def _empty_bounding_set(kept: int) -> None:
    for capability in range(64):
        if kept >> capability & 1:
            continue
        try:
            _prctl(_PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:  # past the last capability that this kernel knows
                return
            raise


def _become(uid: int, gid: int) -> None:
    _prctl(_PR_SET_KEEPCAPS, 1)  # _set_capabilities says what stays
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _prctl(_PR_SET_KEEPCAPS, 0)


def _set_capabilities(mask: int) -> None:
    """capset(2): effective and permitted become `mask`, inheritable empty."""
    header = _CapabilityHeader(_LINUX_CAPABILITY_VERSION_3, 0)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = (_CapabilityData * 2)(_CapabilityData(low, low, 0), _CapabilityData(high, high, 0))
    _check(_libc.capset(ctypes.byref(header), data))


def _prctl(option: int, argument: int) -> None:
    _check(_libc.prctl(option, *map(ctypes.c_ulong, (argument, 0, 0, 0))))


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _status() -> dict[str, str]:
    lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _mask(status: Mapping[str, str], key: str) -> int:
    """A set of capabilities; all of them where the kernel does not say."""
    return int(status.get(key, "f" * 16), 16)
