/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * OOM kills by scope and by the victim's cgroup.
 *
 * mark_victim also fires for a task that was exiting already and is not killed (the kernel does not count that one). A
 * kill sends SIGKILL from the kernel first, so a kill is: signal_generate(SIGKILL, SEND_SIG_PRIV), then mark_victim of
 * the same task by the same task. Everything about the victim is read at the signal, which has its task_struct on
 * all kernels. The scope is in the call chain: a kill in a memory cgroup passes mem_cgroup_out_of_memory.
 */
#include "program.h"
#define EXEMPLAR_WORDS 1
#include "exemplar.h"
#include "events.h"

#define SIGKILL 9
#define SEND_SIG_PRIV 1
#define LEVELS 12
#define NAME_LEN 128 /* "cri-containerd-", a 64-digit id and ".scope" are 85 */
#define FRAMES 16

enum scope { SCOPE_UNKNOWN, SCOPE_GLOBAL, SCOPE_MEMCG, SCOPES };

struct level {
	char name[NAME_LEN];
};

struct victim {
	u64 time_ns; /* CLOCK_BOOTTIME */
	u64 pid;     /* of the process */
	u64 comm[2];
	u64 cgroup;
	u64 anon_pages;
	u64 file_pages;
	u64 shmem_pages;
	u64 scope;
	u64 killer_pid; /* the process whose allocation led to it */
	u64 killer_comm[2];
	u32 thread; /* of the task that mark_victim names */
	s32 oom_score_adj;
	u64 deeper;  /* whether there are levels above the path */
	struct level path[LEVELS]; /* names of the victim's cgroup and those above it, innermost first */
};

struct kills_key {
	u64 cgroup;
	u64 scope;
};

struct kills {
	u64 count;
	u64 deeper;
	struct level path[LEVELS]; /* kept, because the cgroup may be gone when the count is read */
#ifdef EXEMPLAR_INTERVAL_NS
	struct exemplar count_exemplar;
#endif
};

/* A hash because cgroups are open-ended. */
BPF_TABLE("hash", struct kills_key, struct kills, kills, MAX_CGROUPS);
BPF_ARRAY(kills_other, u64, SCOPES);
BPF_ARRAY(kills_zero, struct kills, 1);
/*
 * A group that is killed as a whole (memory.oom.group) includes its first victim, which the kernel then kills and counts
 * a second time. This is no kill to us, but the two counts do not compare without it.
 */
BPF_ARRAY(kills_again, u64, 1);
/* Signals on their way to mark_victim, by the task that sends: other kernel signals may come in between. */
BPF_TABLE("lru_hash", u64, struct victim, pending, 64);
/* One a CPU to build a victim in: it is too large for the stack. */
BPF_PERCPU_ARRAY(workplace, struct victim, 1);

#ifdef EVENTS_ON
EVENTS(events, struct victim, RING_PAGES);
#endif

static __always_inline struct kernfs_node *parent_of(struct kernfs_node *node)
{
#ifdef HAVE_kernfs_node___parent
	return READ(node, __parent);
#else
	return READ(node, parent);
#endif
}

static __always_inline void read_cgroup(struct victim *victim, struct task_struct *task)
{
	struct css_set *cgroups = READ(task, cgroups);
	struct cgroup *cgroup = READ(cgroups, dfl_cgrp);
	struct kernfs_node *node = READ(cgroup, kn), *parent;

	victim->cgroup = READ(node, id);
#pragma unroll
	for (int i = 0; i < LEVELS; i++) {
		victim->path[i].name[0] = 0;
		parent = node ? parent_of(node) : NULL;
		if (parent) /* the root has no name */
			bpf_probe_read_kernel_str(victim->path[i].name, NAME_LEN, READ(node, name));
		node = parent;
	}
	victim->deeper = node && parent_of(node);
}

/*
 * As the kernel's own log line: counters without what CPUs have not handed in yet. rss_stat is an array of percpu_counter
 * from 6.2 on, before that a struct of atomic_long_t.
 */
#define MM_FILEPAGES 0
#define MM_ANONPAGES 1
#define MM_SHMEMPAGES 3

static __always_inline void read_pages(u64 *to, struct mm_struct *mm, int kind)
{
	s64 count = 0;

#ifndef HAVE_mm_rss_stat_count
	bpf_probe_read_kernel(&count, sizeof(count), (void *)&mm->rss_stat[kind].count);
#else
	bpf_probe_read_kernel(&count, sizeof(count), (void *)&mm->rss_stat + kind * sizeof(count));
#endif
	*to = count > 0 ? count : 0;
}

static __always_inline void read_memory(struct victim *victim, struct task_struct *task)
{
	struct mm_struct *mm = READ(task, mm);

	victim->file_pages = victim->anon_pages = victim->shmem_pages = 0;
	if (!mm)
		return;
	read_pages(&victim->file_pages, mm, MM_FILEPAGES);
	read_pages(&victim->anon_pages, mm, MM_ANONPAGES);
	read_pages(&victim->shmem_pages, mm, MM_SHMEMPAGES);
}

static __always_inline bool called_by(void *ctx, u64 function, u64 size)
{
	u64 frames[FRAMES] = {};

	bpf_get_stack(ctx, frames, sizeof(frames), 0);
#pragma unroll
	for (int i = 0; i < FRAMES; i++)
		if (frames[i] - function < size)
			return true;
	return false;
}

static __always_inline void count_again(void *ctx, struct signal_struct *signal)
{
#ifdef SYMBOL_mem_cgroup_scan_tasks
	int first = 0;
	u64 *again;

	if (!READ(signal, oom_mm)) /* not a victim yet */
		return;
	if (!called_by(ctx, SYMBOL_mem_cgroup_scan_tasks, SYMBOL_mem_cgroup_scan_tasks_SIZE))
		return; /* such as the end of a container's process 1, which kills all others */
	again = kills_again.lookup(&first);
	if (again)
		__sync_fetch_and_add(again, 1);
#endif
}

PROGRAM(signal_generate)
{
	struct task_struct *task = (void *)ctx[2];
	u64 sender = bpf_get_current_pid_tgid();
	struct signal_struct *signal;
	struct victim *victim;
	int first = 0;

	if ((int)ctx[0] != SIGKILL || ctx[1] != SEND_SIG_PRIV || !counting())
		return 0;
	victim = workplace.lookup(&first);
	if (!victim)
		return 0;
	victim->thread = READ(task, pid);
	victim->pid = READ(task, tgid);
	bpf_probe_read_kernel(&victim->comm, sizeof(victim->comm), (void *)task->comm);
	victim->killer_pid = sender >> 32;
	bpf_get_current_comm(&victim->killer_comm, sizeof(victim->killer_comm));
	signal = READ(task, signal);
	count_again(ctx, signal);
	victim->oom_score_adj = (s16)READ(signal, oom_score_adj);
	read_memory(victim, task);
	read_cgroup(victim, task);
	pending.update(&sender, victim);
	return 0;
}

static __always_inline u64 scope_of(void *ctx)
{
#ifdef SYMBOL_mem_cgroup_out_of_memory
	u64 within = called_by(ctx, SYMBOL_mem_cgroup_out_of_memory, SYMBOL_mem_cgroup_out_of_memory_SIZE);

	return within ? SCOPE_MEMCG : SCOPE_GLOBAL;
#else
	return SCOPE_UNKNOWN;
#endif
}

static __always_inline void count(struct victim *victim)
{
	struct kills_key key = { .cgroup = victim->cgroup, .scope = victim->scope };
	struct kills *into = kills.lookup(&key), *zero;
	int first = 0, scope = victim->scope;
	u64 *other;

	if (!into) {
		zero = kills_zero.lookup(&first);
		if (zero)
			kills.insert(&key, zero);
		into = kills.lookup(&key);
		if (into) {
			into->deeper = victim->deeper;
			bpf_probe_read_kernel(into->path, sizeof(into->path), victim->path);
		}
	}
	if (!into) {
		other = kills_other.lookup(&scope);
		if (other)
			__sync_fetch_and_add(other, 1);
		return;
	}
	__sync_fetch_and_add(&into->count, 1);
#ifdef EXEMPLAR_INTERVAL_NS
	if (exemplar_due(&into->count_exemplar, victim->time_ns)) {
		struct exemplar fresh = { .stamp_ns = victim->time_ns, .time_ns = victim->time_ns, .value = 1 };

		fresh.pid = victim->pid;
		fresh.comm[0] = victim->comm[0];
		fresh.comm[1] = victim->comm[1];
		exemplar_store(&into->count_exemplar, &fresh);
	}
#endif
}

PROGRAM(mark_victim)
{
	u64 killer = bpf_get_current_pid_tgid();
	struct victim *victim;
	u32 thread;

	if (!counting())
		return 0;
#if ARGS_mark_victim > 1 /* (task, uid), else (pid) */
	thread = READ((struct task_struct *)ctx[0], pid);
#else
	thread = (u32)ctx[0];
#endif
	victim = pending.lookup(&killer);
	if (!victim || victim->thread != thread)
		return 0; /* it was exiting already: not a kill */
	victim->time_ns = bpf_ktime_get_boot_ns();
	victim->scope = scope_of(ctx);
	count(victim);
#ifdef EVENTS_ON
	if (events.ringbuf_output(victim, sizeof(*victim), 0))
		lose(LOSS_RING_FULL);
#endif
	pending.delete(&killer);
	return 0;
}
