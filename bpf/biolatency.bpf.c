/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Block I/O: queue time, device time, size and errors by disk and operation.
 *
 * A request is known by its pointer from its last issue (a requeue issues it again and restarts the clock) to the
 * completion of its last part. Flushes: the block layer issues and completes one request of its own for a flush; the
 * requests that asked for it complete without an issue, and so are not counted twice. All is counted at completion, so
 * the histograms of one disk agree in number. Queue time runs from the request's start, as in the kernel's own ticks.
 */
#include "program.h"
#include "histogram.h"
#define EXEMPLAR_WORDS 1 /* sector */
#include "exemplar.h"

#define DISK_NAME_LEN 32
#define REQ_OP_MASK 0xff

enum operation { OPERATION_READ, OPERATION_WRITE, OPERATION_FLUSH, OPERATION_DISCARD, OPERATION_OTHER, OPERATIONS };

struct disk_name {
	char disk[DISK_NAME_LEN];
};

struct block_io_key {
	char disk[DISK_NAME_LEN];
	u32 operation;
};

struct block_io {
	struct seconds_histogram device;
	struct seconds_histogram queue;
	struct bytes_histogram size;
#ifdef EXEMPLAR_INTERVAL_NS
	struct exemplar device_exemplars[SECONDS_EXEMPLARS];
	struct exemplar queue_exemplars[SECONDS_EXEMPLARS];
	struct exemplar size_exemplars[BYTES_EXEMPLARS];
#endif
};

struct error_key {
	char disk[DISK_NAME_LEN];
	u32 operation;
	s32 error;
};

struct inflight {
	u64 started_ns; /* 0 where it is not known */
	u64 issued_ns;
	u64 done_bytes; /* by parts that completed before */
#ifdef EXEMPLAR_INTERVAL_NS
	u64 pid;
	u64 comm[2];
	u64 cgroup;
#endif
};

/* A hash because a request's identity is its address; preallocated, since completions run in interrupts. */
BPF_TABLE("hash", u64, struct inflight, inflight, MAX_INFLIGHT);
/* Hashes because disks come and go, and by name because device numbers are used again for other disks. */
BPF_TABLE("hash", struct block_io_key, struct block_io, block_io, MAX_DEVICES * OPERATIONS);
BPF_TABLE("hash", struct error_key, u64, block_io_errors, (MAX_DEVICES + 1) * OPERATIONS);
/* Which disks have series of their own: all operations of one, or none. Asked only when a disk and operation are new. */
BPF_TABLE("hash", struct disk_name, u64, disks, MAX_DEVICES);
/* Takes the disks that find no place, so that totals stay whole. */
BPF_ARRAY(block_io_other, struct block_io, OPERATIONS);
/* Empty requests that only asked for a flush: the kernel counts them as writes, we do not. */
BPF_PERCPU_ARRAY(flush_askers, u64, 1);
/* All zero: a struct block_io is too large for the stack. */
BPF_ARRAY(block_io_zero, struct block_io, 1);

static __always_inline struct gendisk *disk_of(struct request *rq)
{
#ifdef HAVE_request_rq_disk
	return READ(rq, rq_disk);
#else
	struct request_queue *q = READ(rq, q);

	return READ(q, disk);
#endif
}

/* The kernel's own grouping (op_stat_group): all other even operations read, all other odd ones write. */
static __always_inline u32 operation_of(struct request *rq)
{
	u32 op = READ(rq, cmd_flags) & REQ_OP_MASK;

	if (op == REQ_OP_FLUSH)
		return OPERATION_FLUSH;
	if (op == REQ_OP_DISCARD)
		return OPERATION_DISCARD;
	if (op == REQ_OP_DRV_IN || op == REQ_OP_DRV_OUT)
		return OPERATION_OTHER;
	return op & 1 ? OPERATION_WRITE : OPERATION_READ;
}

#ifdef EXEMPLAR_INTERVAL_NS
/* The cgroup that caused the I/O, also for writeback, which a kernel thread submits. 0 where blkio is on cgroup v1. */
static __always_inline u64 cause_of(struct request *rq)
{
#if defined(HAVE_bio_bi_blkg) && defined(HAVE_blkcg_gq_blkcg)
	struct bio *bio = READ(rq, bio);
	struct blkcg_gq *group = bio ? READ(bio, bi_blkg) : NULL;
	struct blkcg *blkcg = group ? READ(group, blkcg) : NULL;
	struct cgroup *cgroup = blkcg ? READ(blkcg, css.cgroup) : NULL;
	struct cgroup_root *root = cgroup ? READ(cgroup, root) : NULL;
	struct kernfs_node *node;

	if (!root || READ(root, hierarchy_id) != 0)
		return 0;
	node = READ(cgroup, kn);
	return READ(node, id);
#else
	return 0;
#endif
}

static __always_inline void remember(struct exemplar *exemplar, u64 value, u64 now, struct request *rq,
				     const struct inflight *start)
{
	struct exemplar fresh = { .stamp_ns = now, .value = value };

	if (!exemplar_due(exemplar, now))
		return;
	fresh.time_ns = bpf_ktime_get_boot_ns();
	fresh.pid = start->pid;
	fresh.comm[0] = start->comm[0];
	fresh.comm[1] = start->comm[1];
	fresh.cgroup = start->cgroup;
	fresh.words[0] = READ(rq, __sector);
	exemplar_store(exemplar, &fresh);
}
#define REMEMBER(io, of, octave, value)                                                      \
	do {                                                                                 \
		u32 __octave = (octave);                                                     \
		HIDE(__octave);                                                              \
		if (__octave < sizeof((io)->of##_exemplars) / sizeof(struct exemplar))       \
			remember(&(io)->of##_exemplars[__octave], (value), now, rq, start);  \
	} while (0)
#else
#define REMEMBER(io, of, octave, value) (void)(octave)
#endif

/*
 * Not set where the disk's iostats are switched off: 0 then, and since "block: move iostat check into
 * blk_account_io_start()" what an earlier request left there. The block layer's own flushes always have it.
 */
static __always_inline u64 started_ns_of(struct request *rq)
{
#ifdef __RQF_IO_STAT
	if (!(READ(rq, rq_flags) & 1U << __RQF_IO_STAT) && operation_of(rq) != OPERATION_FLUSH)
		return 0;
#endif
	return READ(rq, start_time_ns);
}

PROGRAM(block_rq_issue)
{
	struct request *rq = (void *)ctx[ARGS_block_rq_issue - 1];
	struct inflight start = {}, *known;
	u64 key = (u64)rq;

	if (!counting())
		return 0;
#ifdef EXEMPLAR_INTERVAL_NS
	start.pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(&start.comm, sizeof(start.comm));
	start.cgroup = cause_of(rq);
#endif
	start.started_ns = started_ns_of(rq);
	start.issued_ns = bpf_ktime_get_ns();
	if (!inflight.insert(&key, &start))
		return 0;
	known = inflight.lookup(&key);
	if (!known)
		lose(LOSS_MAP_FULL);
	else if (known->started_ns == start.started_ns) /* issued again: whose it was and what is done stays */
		known->issued_ns = start.issued_ns;
	else /* left by a request whose completion no program saw */
		*known = start;
	return 0;
}

static __always_inline bool has_place(const struct block_io_key *key)
{
	struct disk_name name;
	u64 one = 1;

	__builtin_memcpy(name.disk, key->disk, sizeof(name.disk));
	if (disks.lookup(&name))
		return true;
	disks.insert(&name, &one);
	return disks.lookup(&name);
}

/* Renames the key to `other` where the disk has no place. */
static __always_inline struct block_io *block_io_of(struct block_io_key *key)
{
	struct block_io *io = block_io.lookup(key), *zero;
	int first = 0, operation = key->operation;

	if (io)
		return io;
	zero = block_io_zero.lookup(&first);
	if (zero && has_place(key)) {
		block_io.insert(key, zero);
		io = block_io.lookup(key);
		if (io)
			return io;
	}
	__builtin_memset(key->disk, 0, sizeof(key->disk));
	__builtin_memcpy(key->disk, "other", sizeof("other"));
	return block_io_other.lookup(&operation);
}

static __always_inline void count_error(struct block_io_key *of, s32 error)
{
	struct error_key key = { .operation = of->operation, .error = error };
	u64 *count, zero = 0;

	__builtin_memcpy(key.disk, of->disk, sizeof(key.disk));
	count = block_io_errors.lookup_or_try_init(&key, &zero);
	if (count)
		__sync_fetch_and_add(count, 1);
	else
		lose(LOSS_MAP_FULL);
}

static __always_inline void count_flush_asker(void)
{
	int only = 0;
	u64 *count = flush_askers.lookup(&only);

	if (count)
		__sync_fetch_and_add(count, 1);
}

PROGRAM(block_rq_complete)
{
	struct request *rq = (void *)ctx[0];
	s32 error = (s32)ctx[1];
	u32 bytes = (u32)ctx[2];
	u64 request = (u64)rq;
	struct inflight *start;
	struct block_io_key key = {};
	struct gendisk *disk;
	struct block_io *io;
	u64 now;
	u32 octave;

	if (!counting())
		return 0;
	start = inflight.lookup(&request);
	if (!start) {
		if (!bytes)
			count_flush_asker();
		return 0;
	}
	if (bytes < READ(rq, __data_len)) {
		start->done_bytes += bytes;
		return 0;
	}
	now = bpf_ktime_get_ns();
	disk = disk_of(rq);
	key.operation = operation_of(rq);
	bpf_probe_read_kernel(key.disk, sizeof(key.disk), (void *)disk->disk_name);
	io = block_io_of(&key);
	if (io) {
		u64 device_ns = now - start->issued_ns, size = start->done_bytes + bytes;

		octave = OBSERVE_SECONDS(&io->device, device_ns);
		REMEMBER(io, device, octave, device_ns);
		octave = OBSERVE_BYTES(&io->size, size);
		REMEMBER(io, size, octave, size);
		if (start->started_ns) {
			u64 queue_ns = start->issued_ns > start->started_ns ? start->issued_ns - start->started_ns : 0;

			octave = OBSERVE_SECONDS(&io->queue, queue_ns);
			REMEMBER(io, queue, octave, queue_ns);
		}
		if (error)
			count_error(&key, error);
	}
	inflight.delete(&request);
	return 0;
}
