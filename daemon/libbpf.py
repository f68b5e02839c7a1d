# SPDX-License-Identifier: Apache-2.0
"""The kernel's bpf() interface, through libbpf: the only file that calls it. No LLVM, no bcc.

Every function raises `OSError` with the kernel's errno and the name of the object. C signatures stand in the
docstrings; they are libbpf 1.0's (Debian 12 has 1.1) and stable.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from daemon.errors import UnsupportedError

MAP_TYPES = {
    1: "hash", 2: "array", 5: "percpu_hash", 6: "percpu_array", 9: "lru_hash", 27: "ringbuf", 29: "task_storage",
}  # fmt: skip
PER_CPU = frozenset({"percpu_hash", "percpu_array"})
ITERABLE = frozenset({"hash", "array", "percpu_hash", "percpu_array", "lru_hash"})

PROG_TYPE_KPROBE, PROG_TYPE_RAW_TRACEPOINT, PROG_TYPE_TRACING = 2, 17, 26
ATTACH_TRACE_RAW_TP, ATTACH_TRACE_FENTRY, ATTACH_TRACE_FEXIT, ATTACH_TRACE_ITER, ATTACH_PERF_EVENT = 23, 24, 25, 28, 41
F_RDONLY = 1 << 3  # BPF_F_RDONLY
NOEXIST = 1  # BPF_NOEXIST
STATS_RUN_TIME = 0


class _ProgLoadOpts(ct.Structure):
    """struct bpf_prog_load_opts of libbpf 1.0."""

    _fields_ = (
        ("sz", ct.c_size_t), ("attempts", ct.c_int), ("expected_attach_type", ct.c_int),
        ("prog_btf_fd", ct.c_uint32), ("prog_flags", ct.c_uint32), ("prog_ifindex", ct.c_uint32),
        ("kern_version", ct.c_uint32), ("attach_btf_id", ct.c_uint32), ("attach_prog_fd", ct.c_uint32),
        ("attach_btf_obj_fd", ct.c_uint32), ("fd_array", ct.c_void_p),
        ("func_info", ct.c_void_p), ("func_info_cnt", ct.c_uint32), ("func_info_rec_size", ct.c_uint32),
        ("line_info", ct.c_void_p), ("line_info_cnt", ct.c_uint32), ("line_info_rec_size", ct.c_uint32),
        ("log_level", ct.c_uint32), ("log_size", ct.c_uint32), ("log_buf", ct.c_void_p),
    )  # fmt: skip


class _ObjGetOpts(ct.Structure):
    _fields_ = (("sz", ct.c_size_t), ("file_flags", ct.c_uint32))


class _BatchOpts(ct.Structure):
    _fields_ = (("sz", ct.c_size_t), ("elem_flags", ct.c_uint64), ("flags", ct.c_uint64))


class _MapInfo(ct.Structure):
    """struct bpf_map_info, as far as it is used."""

    _fields_ = (
        ("type", ct.c_uint32), ("id", ct.c_uint32), ("key_size", ct.c_uint32), ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32), ("map_flags", ct.c_uint32), ("name", ct.c_char * 16),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MapInfo:
    type: str
    id: int
    key_size: int
    value_size: int
    max_entries: int

    def shape(self) -> tuple[str, int, int, int]:
        return (self.type, self.key_size, self.value_size, self.max_entries)


def _open() -> ct.CDLL:
    try:
        return ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise UnsupportedError(f"libbpf.so.1 cannot be opened ({error}); install the package libbpf1") from error


_lib = _open()
_PRINT = ct.CFUNCTYPE(ct.c_int, ct.c_int, ct.c_char_p, ct.c_void_p)
_SAMPLE = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)
_quiet = _PRINT(lambda *_: 0)
_lib.libbpf_set_print.argtypes = [_PRINT]
_lib.libbpf_set_print.restype = ct.c_void_p
_lib.libbpf_set_print(_quiet)
_lib.bpf_prog_load.argtypes = [ct.c_int, ct.c_char_p, ct.c_char_p, ct.c_char_p, ct.c_size_t, ct.c_void_p]
_lib.bpf_map_lookup_batch.argtypes = [ct.c_int] + [ct.c_void_p] * 5
_lib.bpf_map_lookup_elem.argtypes = [ct.c_int, ct.c_char_p, ct.c_void_p]
_lib.bpf_map_get_next_key.argtypes = [ct.c_int, ct.c_char_p, ct.c_void_p]
_lib.bpf_map_update_elem.argtypes = [ct.c_int, ct.c_char_p, ct.c_char_p, ct.c_uint64]
_lib.ring_buffer__new.argtypes = [ct.c_int, _SAMPLE, ct.c_void_p, ct.c_void_p]
_lib.ring_buffer__new.restype = ct.c_void_p
_lib.ring_buffer__consume.argtypes = [ct.c_void_p]
_lib.ring_buffer__free.argtypes = [ct.c_void_p]
_lib.ring_buffer__free.restype = None


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def possible_cpus() -> int:
    """int libbpf_num_possible_cpus(void): how many values a per-CPU map holds for each key."""
    return _check(_lib.libbpf_num_possible_cpus(), "/sys/devices/system/cpu/possible")


class VerifierError(OSError):
    """The verifier's no; `log` holds its words, the last line of which usually tells why."""

    def __init__(self, number: int, what: str, log: str) -> None:
        super().__init__(number, what)
        self.log = log


def vmlinux_btf_id(target: str, attach_type: int) -> int:
    """int libbpf_find_vmlinux_btf_id(const char *name, enum bpf_attach_type)."""
    return _check(_lib.libbpf_find_vmlinux_btf_id(target.encode(), attach_type), f"BTF id of {target}")


def prog_load(name: str, prog_type: int, instructions: bytes, attach_type: int = 0, btf_id: int = 0) -> int:
    """int bpf_prog_load(...): a program's descriptor. The verifier's log is asked for only after a no."""
    options = _ProgLoadOpts(sz=ct.sizeof(_ProgLoadOpts), expected_attach_type=attach_type, attach_btf_id=btf_id)
    arguments = (prog_type, name[:15].encode(), b"GPL", instructions, len(instructions) // 8)
    result = _lib.bpf_prog_load(*arguments, ct.byref(options))
    if result >= 0:
        return int(result)
    log = ct.create_string_buffer(1 << 20)
    options.log_level, options.log_size, options.log_buf = 1, len(log), ct.addressof(log)
    second = _lib.bpf_prog_load(*arguments, ct.byref(options))
    if second >= 0:
        return int(second)
    raise VerifierError(-result, f"program {name}: {os.strerror(-result)}", log.value.decode(errors="replace"))


def raw_tracepoint_open(name: str | None, prog: int) -> int:
    """int bpf_raw_tracepoint_open(const char *name, int prog_fd): a link; name is NULL for tp_btf, fentry, fexit."""
    return _check(_lib.bpf_raw_tracepoint_open(name.encode() if name else None, prog), f"attach {name or 'program'}")


def link_create(prog: int, target: int, attach_type: int) -> int:
    """int bpf_link_create(int prog_fd, int target_fd, enum bpf_attach_type, opts)."""
    return _check(_lib.bpf_link_create(prog, target, attach_type, None), "bpf_link_create")


def iterate(link: int) -> bytes:
    """int bpf_iter_create(int link_fd): runs the iterator program once over all; what it printed."""
    descriptor = _check(_lib.bpf_iter_create(link), "bpf_iter_create")
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        return stream.read() or b""


def obj_pin(descriptor: int, path: Path) -> None:
    """int bpf_obj_pin(int fd, const char *pathname)."""
    _check(_lib.bpf_obj_pin(descriptor, bytes(path)), f"pin {path}")


def obj_get(path: Path, flags: int = 0) -> int:
    """int bpf_obj_get_opts(const char *pathname, opts): the descriptor of a pinned map, program or link."""
    options = _ObjGetOpts(sz=ct.sizeof(_ObjGetOpts), file_flags=flags)
    return _check(_lib.bpf_obj_get_opts(bytes(path), ct.byref(options)), f"open pin {path}")


def _fdinfo(descriptor: int) -> dict[str, str]:
    """/proc/self/fdinfo: what the kernel tells of a BPF object, as text."""
    text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def map_info(descriptor: int) -> MapInfo:
    """int bpf_obj_get_info_by_fd(...) of a map. A descriptor of anything else raises ValueError."""
    if "map_type" not in _fdinfo(descriptor):
        raise ValueError("not a BPF map")
    info, size = _MapInfo(), ct.c_uint32(ct.sizeof(_MapInfo))
    _check(_lib.bpf_obj_get_info_by_fd(descriptor, ct.byref(info), ct.byref(size)), "map information")
    name = MAP_TYPES.get(info.type, str(info.type))
    return MapInfo(name, info.id, info.key_size, info.value_size, info.max_entries)


def is_link(descriptor: int) -> bool:
    return "link_id" in _fdinfo(descriptor)


def map_memory_bytes(descriptor: int) -> int:
    """What the kernel charges for a map, in bytes."""
    return int(_fdinfo(descriptor).get("memlock", 0))


@dataclass(frozen=True, slots=True)
class ProgramStatistics:
    """Runs and time are counted only while the sysctl kernel.bpf_stats_enabled is 1; misses always."""

    runs: int
    run_time_ns: int
    recursion_misses: int


def program_statistics(descriptor: int) -> ProgramStatistics:
    info = _fdinfo(descriptor)
    return ProgramStatistics(*(int(info.get(key, 0)) for key in ("run_cnt", "run_time_ns", "recursion_misses")))


def enable_statistics() -> int:
    """int bpf_enable_stats(BPF_STATS_RUN_TIME): counts while the returned descriptor is open."""
    return _check(_lib.bpf_enable_stats(STATS_RUN_TIME), "bpf_enable_stats")


def map_lookup(descriptor: int, key: bytes, value_size: int) -> bytes | None:
    """int bpf_map_lookup_elem(int fd, const void *key, void *value); None where the key is absent."""
    value = ct.create_string_buffer(value_size)
    result = _lib.bpf_map_lookup_elem(descriptor, key, value)
    if result == -errno.ENOENT:
        return None
    _check(result, "map lookup")
    return value.raw


def map_update(descriptor: int, key: bytes, value: bytes, flags: int = 0) -> None:
    """int bpf_map_update_elem(int fd, const void *key, const void *value, __u64 flags)."""
    _check(_lib.bpf_map_update_elem(descriptor, key, value, flags), "map update")


def map_items(descriptor: int, info: MapInfo, value_size: int) -> Iterator[tuple[bytes, memoryview]]:
    """All entries. `value_size` is that of all CPUs' values together, each rounded up to 8 bytes.

    One batch call reads them where the kernel can (per-CPU arrays: 5.13 and later), one call an entry elsewhere.
    """
    items = _batch(descriptor, info, value_size)
    return iter(items) if items is not None else _one_by_one(descriptor, info, value_size)


def _batch(descriptor: int, info: MapInfo, value_size: int) -> list[tuple[bytes, memoryview]] | None:
    """bpf_map_lookup_batch until ENOENT; None where this kernel has none for this map type."""
    # A hash bucket must fit into one call: ENOSPC asks for more room than the chunk has.
    chunk = min(info.max_entries, max(16, (1 << 20) // value_size))
    position = ct.create_string_buffer(max(8, info.key_size))
    start: ct.Array[ct.c_char] | None = None
    options = _BatchOpts(sz=ct.sizeof(_BatchOpts))
    items: list[tuple[bytes, memoryview]] = []
    while True:
        keys, values = ct.create_string_buffer(chunk * info.key_size), bytearray(chunk * value_size)
        count = ct.c_uint32(chunk)
        result = _lib.bpf_map_lookup_batch(
            descriptor, start, position, keys, (ct.c_char * len(values)).from_buffer(values),
            ct.byref(count), ct.byref(options),
        )  # fmt: skip
        if result == -errno.ENOSPC and chunk < info.max_entries:
            chunk = min(info.max_entries, chunk * 2)
            continue
        if result in (-524, -errno.EINVAL, -errno.EOPNOTSUPP) and start is None:  # ENOTSUPP
            return None
        if result != -errno.ENOENT:
            _check(result, "map batch lookup")
        view, raw = memoryview(values), keys.raw
        for i in range(count.value):
            key = raw[i * info.key_size : (i + 1) * info.key_size]
            items.append((key, view[i * value_size : (i + 1) * value_size]))
        if result == -errno.ENOENT or count.value == 0:
            return items
        start = position


def _one_by_one(descriptor: int, info: MapInfo, value_size: int) -> Iterator[tuple[bytes, memoryview]]:
    key: bytes | None = None
    following = ct.create_string_buffer(info.key_size)
    for _ in range(info.max_entries):
        result = _lib.bpf_map_get_next_key(descriptor, key, following)
        if result == -errno.ENOENT:
            return
        _check(result, "next map key")
        key = following.raw
        value = map_lookup(descriptor, key, value_size)
        if value is not None:
            yield key, memoryview(value)


class RingBuffer:
    """struct ring_buffer: drains a pinned BPF ring buffer; `close` undoes it."""

    def __init__(self, descriptor: int, take: Callable[[bytes], None]) -> None:
        def sample(_: object, data: int, size: int) -> int:
            take(ct.string_at(data, size))
            return 0

        self._sample = _SAMPLE(sample)  # libbpf keeps the pointer, so somebody must keep the object
        ct.set_errno(0)
        self._ring = _lib.ring_buffer__new(descriptor, self._sample, None, None)
        if not self._ring:
            number = ct.get_errno()
            raise OSError(number, f"ring buffer: {os.strerror(number)}")

    def drain(self) -> int:
        """int ring_buffer__consume(struct ring_buffer *): how many records were taken."""
        return _check(_lib.ring_buffer__consume(self._ring), "ring buffer")

    def close(self) -> None:
        if self._ring:
            _lib.ring_buffer__free(self._ring)
            self._ring = None
