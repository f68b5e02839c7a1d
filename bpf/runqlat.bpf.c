/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Run queue latency: how long a runnable task waited for a CPU.
 *
 * One program. At sched_switch the scheduler's own account of the next task is still open: it has waited
 * `clock - last_queued` in this queue, and `run_delay` holds all earlier waits. A migration closes the account and opens
 * another, so that the plain difference is too short for exactly the waits that the load balancer cut; the growth of the
 * total since the task's last arrival is the whole wait. The scheduler makes the same sum a moment later (sched_info_arrive),
 * so count and sum equal run_delay and pcount in /proc/PID/schedstat.
 */
#define PLAIN_INCREMENTS /* sched_switch runs with interrupts off, on per-CPU values */
#include "program.h"
#include "histogram.h"
#include "exemplar.h"

struct run_queue {
	struct seconds_histogram wait;
#ifdef EXEMPLAR_INTERVAL_NS
	struct exemplar wait_exemplars[SECONDS_EXEMPLARS];
#endif
};

#ifdef BY_CGROUP
/* A hash because cgroups come and go; per CPU, so that a switch takes no lock. */
BPF_TABLE("percpu_hash", u64, struct run_queue, run_queue, MAX_CGROUPS);
BPF_ARRAY(run_queue_zero, struct run_queue, 1);
#endif
/* All of it without cgroups; what found no place in the hash with them. */
BPF_PERCPU_ARRAY(run_queue_all, struct run_queue, 1);

struct seen {
	u64 total_ns; /* all waits up to and with the last arrival */
	u64 generation; /* of the program that saw it: another one may have missed arrivals since */
};
#ifdef WAITS_IN_TASKS
BPF_TASK_STORAGE(seen_waits, struct seen);
#else
/*
 * By thread id, where a program has no task storage. A hash because thread ids are open-ended, and LRU because nothing
 * tells here that a task has ended: what gives way is, below so many live tasks, one that has.
 */
BPF_TABLE("lru_hash", u32, struct seen, seen_waits, MAX_TASKS);
#endif

static __always_inline u64 cgroup_of(struct task_struct *task)
{
	struct css_set *cgroups = READ(task, cgroups);
	struct cgroup *cgroup = READ(cgroups, dfl_cgrp);
	struct kernfs_node *node = READ(cgroup, kn);

	return READ(node, id);
}

static __always_inline struct run_queue *run_queue_of(struct task_struct *task)
{
	int first = 0;
#ifdef BY_CGROUP
	u64 cgroup = cgroup_of(task);
	struct run_queue *own = run_queue.lookup(&cgroup), *zero;

	if (own)
		return own;
	zero = run_queue_zero.lookup(&first);
	if (zero)
		run_queue.insert(&cgroup, zero);
	own = run_queue.lookup(&cgroup);
	if (own)
		return own;
#endif
	return run_queue_all.lookup(&first);
}

/* Where this task's last arrival is kept; NULL, and a loss, where there is no memory for it. */
static __always_inline struct seen *seen_of(struct task_struct *task)
{
	struct seen *seen;
#ifdef WAITS_IN_TASKS
	seen = seen_waits.task_storage_get(task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
#else
	struct seen never = {};
	u32 thread = READ(task, pid);

	seen = seen_waits.lookup(&thread);
	if (!seen) {
		seen_waits.update(&thread, &never);
		seen = seen_waits.lookup(&thread);
	}
#endif
	if (!seen)
		lose(LOSS_TASK_STATE); /* this wait may be too short, and so may the next one be too long */
	return seen;
}

static __always_inline u64 whole_wait(struct task_struct *next, u64 wait_ns)
{
	u64 total_ns = READ(next, sched_info.run_delay) + wait_ns;
	struct seen *seen = seen_of(next);

	if (!seen)
		return wait_ns;
	/* A task that never ran has waited since it was born; one that ran before we came has an unknown past. */
	if (READ(next, sched_info.pcount) == 0)
		wait_ns = total_ns;
	else if (seen->generation == GENERATION && seen->total_ns <= total_ns)
		wait_ns = total_ns - seen->total_ns;
	seen->total_ns = total_ns;
	seen->generation = GENERATION;
	return wait_ns;
}

PROGRAM(sched_switch)
{
	struct task_struct *next = (void *)ctx[2];
	struct run_queue *into;
	struct cfs_rq *cfs_rq;
	struct rq *rq;
	u64 queued, clock, wait_ns;
	u32 octave;

	queued = READ(next, sched_info.last_queued);
	if (!queued || !counting()) /* not queued: the idle task */
		return 0;
	cfs_rq = READ(next, se.cfs_rq);
	rq = READ(cfs_rq, rq);
	clock = READ(rq, clock);
	wait_ns = whole_wait(next, clock > queued ? clock - queued : 0);
	into = run_queue_of(next);
	if (!into)
		return 0;
	octave = OBSERVE_SECONDS(&into->wait, wait_ns);
#ifdef EXEMPLAR_INTERVAL_NS
	HIDE(octave);
	if (octave < SECONDS_EXEMPLARS && exemplar_due(&into->wait_exemplars[octave], clock)) {
		struct exemplar fresh = { .stamp_ns = clock, .value = wait_ns };

		fresh.time_ns = bpf_ktime_get_boot_ns();
		fresh.pid = READ(next, tgid);
		bpf_probe_read_kernel(&fresh.comm, sizeof(fresh.comm), (void *)next->comm);
		fresh.cgroup = cgroup_of(next);
		exemplar_store(&into->wait_exemplars[octave], &fresh);
	}
#endif
	return 0;
}
