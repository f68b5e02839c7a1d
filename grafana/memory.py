# SPDX-License-Identifier: Apache-2.0
"""Page cache and OOM: whether memory holds what is read, and who was killed when it ran out."""

from __future__ import annotations

from collectors.oomkill import MESSAGE_ID
from grafana.host import HITS
from grafana.parts import ANY, Column, Help, Query, board, graph, grown, table, variable

_OOM = 'HOST,cgroup=~"$cgroup"'


def _pages(name: str) -> str:
    return f"sum by (instance) (rate(bpf_page_cache_{name}_total{{HOST}}[$__rate_interval]))"


_PANELS = (
    graph(
        "Hit ratio", "percentunit",
        Help("Share of page accesses by reads and faults that found their page in memory.",
             "steady; above 90 % on most hosts.",
             "a fall with more misses: what is read no longer fits. Give the readers more memory, or let a scan use"
             " direct I/O. Not exact where bpfmetricsd itself says approximate."),
        Query(HITS, "hits"),
    ),
    graph(
        "Accesses and misses", "short",
        Help("Pages each second that reads asked for or faults touched, and those of them that were not in memory.",
             "misses are a small part.", "each miss is a read from disk: see Block I/O for what it costs."),
        Query(_pages("accesses"), "{{instance}} accesses"), Query(_pages("misses"), "{{instance}} misses"),
    ),
    graph(
        "Readahead", "short",
        Help("Pages each second that came into the cache beyond those that were missed: readahead, and new pages by"
             " writes.", "several times the misses while files are read in order.",
             "near zero with many misses: random reads. Far more than is then accessed: readahead is too large."),
        Query(f"clamp_min({_pages('added')} - {_pages('misses')}, 0)", "{{instance}}"),
    ),
    graph(
        "Dirtied pages", "short",
        Help("Pages each second that were written to in memory and must go to disk.", "follows the writes.",
             "steadily more than the disk writes: writers will be stopped at vm.dirty_ratio."),
        Query(_pages("dirtied"), "{{instance}}"),
    ),
    graph(
        "OOM kills", "none",
        Help("Processes killed for want of memory, by scope and the victim's cgroup.", "none.",
             "memcg: raise memory.max of the cgroup or mend its leak. global: the host is too small for what runs on"
             f" it; give cgroups limits. The points name victims; more of them: journalctl MESSAGE_ID={MESSAGE_ID}."),
        Query(grown("bpf_oom_kills_total", _OOM, "scope, cgroup"), "{{cgroup}} ({{scope}})"), stack=True,
    ),
    table(
        "OOM kills since counting began",
        Help("All kills by host, scope and the victim's cgroup, most first.", "empty, or old news.",
             "a cgroup that comes back here needs more memory or a leak mended."),
        [Column("Kills", f"sum by (instance, scope, cgroup) (bpf_oom_kills_total{{{_OOM}}}) > 0", "none", ANY)],
        sort="Kills", width=12, height=8,
    ),
)  # fmt: skip

DASHBOARD = board(
    "bpf-memory", "Page cache and OOM", "Does memory hold what is read, and who was killed when it ran out?", _PANELS,
    variable("cgroup", "bpf_oom_kills_total{HOST}"),
)  # fmt: skip
