/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * The kernel does not run a program on a CPU where that program is running already (recursion_misses in its information): when an
 * interrupt catches one in the middle, the event of the interrupt would be lost. So a program that an interrupt can catch is
 * attached twice. The first copy marks the CPU while it works. The second works only where it finds the mark, which is when the
 * first was skipped; it is so short otherwise that it costs some 20 ns, and being skipped then loses nothing.
 */
#ifndef BPFMETRICSD_TWICE_H
#define BPFMETRICSD_TWICE_H

BPF_PERCPU_ARRAY(first_at_work, u32, 1);

static __always_inline u32 *work_mark(void)
{
	int only = 0;

	return first_at_work.lookup(&only);
}

/* PROGRAM_TWICE(name) { body } defines the programs `name` and `name_again` with one body. */
#define PROGRAM_TWICE(name)                                              \
	static __always_inline int name##_body(unsigned long long *ctx); \
	PROGRAM(name)                                                    \
	{                                                                \
		u32 *mark = work_mark();                                 \
		if (!mark)                                               \
			return 0;                                        \
		*(volatile u32 *)mark = 1;                               \
		name##_body(ctx);                                        \
		*(volatile u32 *)mark = 0;                               \
		return 0;                                                \
	}                                                                \
	PROGRAM(name##_again)                                            \
	{                                                                \
		u32 *mark = work_mark();                                 \
		return mark && *mark ? name##_body(ctx) : 0;             \
	}                                                                \
	static __always_inline int name##_body(unsigned long long *ctx)

#endif
