# SPDX-License-Identifier: Apache-2.0
"""confine.py PROFILE COMMAND…: runs the command under a seccomp profile of the OCI kind, by libseccomp.

A file of its own that imports nothing of ours: it runs inside of a container.
"""

import ctypes
import errno
import json
import os
import sys

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(0)


def main(path: str, command: list[str]) -> None:
    with open(path) as file:
        profile = json.load(file)
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ERRNO | profile["defaultErrnoRet"])))
    for rule in profile["syscalls"]:
        assert rule["action"] == "SCMP_ACT_ALLOW"
        for name in rule["names"]:
            number = library.seccomp_syscall_resolve_name(name.encode())
            if number < 0:  # newer than this library
                continue
            result = library.seccomp_rule_add(context, ctypes.c_uint32(_ALLOW), number, 0)
            if result < 0:
                raise OSError(-result, f"{name}: {errno.errorcode.get(-result)}")
    result = library.seccomp_load(context)
    if result < 0:
        raise OSError(-result, "seccomp_load")
    os.execv(command[0], command)


main(sys.argv[1], sys.argv[2:])
