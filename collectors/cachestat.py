# SPDX-License-Identifier: Apache-2.0
"""Page cache, in pages: accesses by reads and faults, misses, additions, dirtied pages.

An access is a page that a read asked for (each time, also a part of it), or that a fault on a mapped file touched: a
touch of a page that is mapped already is nothing to the kernel, and what it maps around a fault was not asked for. A
miss is an access whose page was not in the cache, nor on its way into it. Buffered writes are no accesses; readahead
adds pages that nobody asked for, so additions are more than misses. The kernel adds and dirties folios of many pages:
one written byte may dirty them all, as in `nr_dirtied` of `/proc/vmstat`. tmpfs has nothing behind it and is not
counted.

Asynchronous reads (io_uring) that have to wait are known in part. Of cold pages read at random, one page after the
other, all 1024 were seen as accesses and as misses; 16 requests at a time made 1024 accesses, of which 19 to 46 were
seen as misses. Requests of 16 pages that wait may lack rounds: of 1024 accesses 474 to 1024 were seen by tracepoints,
all by functions; of as many misses 169 to 1024. Reads through overlayfs, and Linux AIO without O_DIRECT, count like
others.
"""

from __future__ import annotations

from daemon.declare import Collector, Context, Decoded, Hook, HookKind, Part, Tables, Variant
from daemon.model import Family, Metric, Series

ACCESSES = Metric("bpf_page_cache_accesses", "counter", "Pages that reads asked for or faults touched; unit: pages.")
MISSES = Metric("bpf_page_cache_misses", "counter", "Accessed pages that were not in the page cache; unit: pages.")
ADDED = Metric("bpf_page_cache_added", "counter", "Pages added to the page cache, readahead included; unit: pages.")
DIRTIED = Metric("bpf_page_cache_dirtied", "counter", "Pages of the page cache that became dirty; unit: pages.")
_METRICS = (ACCESSES, MISSES, ADDED, DIRTIED)  # enum counter


def decode(tables: Tables, context: Context) -> Decoded:
    return Decoded([Family(_METRICS[row.key], [Series((), row.value, context.created)]) for row in tables["pages"]])


def _fexit(read: str, *more: str) -> Variant:
    reads = {name: Hook("fexit", name) for name in more} | {"filemap_read": Hook("fexit", read)}
    return Variant(reads, define="READ_FUNCTION")


_KPROBES_STAY = ("bpf_perf_link.perf_file",)  # before kernel 5.15 nothing but a process keeps a kprobe

_READS = (
    Variant({"mm_filemap_get_pages": Hook("tp_btf", "mm_filemap_get_pages")}),
    _fexit("filemap_read", "filemap_splice_read"),  # sendfile apart, from kernel 6.5 on
    _fexit("filemap_read"),
    _fexit("generic_file_buffered_read"),  # before kernel 5.12
    Variant({"mm_filemap_get_pages": Hook("raw_tp", "mm_filemap_get_pages")}),
    Variant(
        {
            "filemap_read_entry": Hook("kprobe", "filemap_read"),
            "filemap_read_return": Hook("kretprobe", "filemap_read"),
        },
        define="READ_FUNCTION",
        needs=_KPROBES_STAY,
        approximate="a kretprobe follows few calls at a time (10, or twice the CPUs): of 960 pages that 60 tasks "
        "waited for at once, 180 were counted",
    ),
)


def _faults(fault: Hook, around: Hook, needs: tuple[str, ...] = ()) -> Variant:
    """The tracepoint of mapping around a fault is passed by where a fault maps a huge page; the function is not."""
    missed = "faults that map 2 MiB of a file at once are not all told: of 4 such, 1 was seen"
    approximate = missed if around.target == "mm_filemap_map_pages" else ""
    return Variant({fault.target: fault, around.target: around}, needs=needs, approximate=approximate)


_FAULTS = (
    _faults(Hook("tp_btf", "mm_filemap_fault"), Hook("fentry", "filemap_map_pages")),
    _faults(Hook("tp_btf", "mm_filemap_fault"), Hook("tp_btf", "mm_filemap_map_pages")),
    _faults(Hook("fentry", "filemap_fault"), Hook("fentry", "filemap_map_pages")),
    _faults(Hook("raw_tp", "mm_filemap_fault"), Hook("raw_tp", "mm_filemap_map_pages")),
    _faults(Hook("kprobe", "filemap_fault"), Hook("kprobe", "filemap_map_pages"), _KPROBES_STAY),
)


def _one(program: str, *targets: str) -> Part:
    kinds: tuple[HookKind, ...] = ("tp_btf", "raw_tp")
    hooks = [Hook(kind, target) for target in targets for kind in kinds]
    return Part(program, tuple(Variant({program: hook}) for hook in hooks))


COLLECTOR = Collector(
    name="cachestat",
    summary="page cache accesses, misses, additions and dirtied pages, in pages",
    parts=(
        Part("reads", _READS),
        Part("faults", _FAULTS),
        _one("mm_filemap_add_to_page_cache", "mm_filemap_add_to_page_cache"),
        _one("writeback_dirty_folio", "writeback_dirty_folio", "writeback_dirty_page"),
    ),
    structs={
        "task_struct": ("bpf_storage?", "ioac?", "maj_flt", "min_flt", "nvcsw", "files", "stack"),
        "task_io_accounting": ("syscr?", "syscw?"),
        "address_space": ("host",),
        "inode": ("i_size", "i_sb", "i_mode"),
        "super_block": ("s_magic",),
        "folio": ("mapping?", "index?", "_nr_pages?", "_folio_nr_pages?"),
        "page": ("mapping?", "index?"),
        "kiocb": ("ki_pos", "ki_filp"),
        "file": ("f_mapping", "f_pos"),
        "files_struct": ("fdt",),
        "fdtable": ("fd",),
        "vm_fault": ("vma", "pgoff"),
        "vm_area_struct": ("vm_file",),
        "pt_regs": ("di", "si", "dx", "ax", "r10", "orig_ax"),
    },
    constants=("pageflags.PG_head", "bpf_func_id.BPF_FUNC_task_pt_regs?"),
    options=(),
    metrics=lambda options: _METRICS,
    defines=lambda options: {},
    tables=("pages",),
    decode=decode,
)
