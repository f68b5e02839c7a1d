/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What every program of the project shares. bcc supplies the helpers, the loader the kernel's types
 * (generated from BTF), HAVE_<struct>_<field>, ARGS_<tracepoint> and the options.
 */
#ifndef BPFMETRICSD_PROGRAM_H
#define BPFMETRICSD_PROGRAM_H

#define __always_inline inline __attribute__((always_inline))

/* tp_btf, raw_tp, fentry and fexit all pass their arguments as an array of words. */
#define PROGRAM(name) int name(unsigned long long *ctx)

/*
 * READ(pointer, field): a kernel field. tp_btf, fentry and fexit programs load directly, which the verifier checks
 * (about 1 ns); others call a helper (about 40 ns). DIRECT_READS is set when all programs of the collector may load.
 */
#ifdef DIRECT_READS
#define READ(pointer, field) ((pointer)->field)
#else
#define READ(pointer, field)                                                              \
	({                                                                                \
		typeof((pointer)->field) __value = 0;                                     \
		bpf_probe_read_kernel(&__value, sizeof(__value), (void *)&(pointer)->field); \
		__value;                                                                  \
	})
#endif

/*
 * A program counts only while its own generation is the active one. When a program is replaced on the same maps,
 * old and new are attached together for a moment; one store then hands over, and no event is counted twice or lost.
 */
BPF_ARRAY(control, u64, 1);

static __always_inline bool counting(void)
{
	int only = 0;
	u64 *generation = control.lookup(&only);

	return generation && *generation == GENERATION;
}

/* Events that could not be counted or told, by reason; the order is LOSSES in daemon/reader.py. */
enum loss { LOSS_MAP_FULL, LOSS_RING_FULL, LOSS_TASK_STATE, LOSSES };
BPF_PERCPU_ARRAY(losses, u64, LOSSES);

static __always_inline void lose(int reason)
{
	u64 *count = losses.lookup(&reason);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Keeps the compiler from proving a bound that the verifier would then miss. */
#define HIDE(variable) asm volatile("" : "+r"(variable))

#endif
