/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * One real event beside each octave of a histogram, or beside a counter. Written at most once in
 * EXEMPLAR_INTERVAL_NS, so that it costs the hot path one compare. Compiled only when exemplars are on.
 */
#ifndef BPFMETRICSD_EXEMPLAR_H
#define BPFMETRICSD_EXEMPLAR_H

#ifndef EXEMPLAR_WORDS
#define EXEMPLAR_WORDS 1
#endif

struct exemplar {
	u64 stamp_ns; /* the program's own clock, to tell when the next one is due */
	u64 time_ns;  /* CLOCK_BOOTTIME */
	u64 value;    /* raw unit */
	u64 pid;
	u64 comm[2]; /* char[16] */
	u64 cgroup;  /* cgroup v2 id, 0 where unknown */
	u64 words[EXEMPLAR_WORDS]; /* the collector's own */
	u64 check;   /* all of the above folded: a torn one does not match and is not used */
};

static __always_inline bool exemplar_due(const struct exemplar *exemplar, u64 now_ns)
{
#ifdef EXEMPLAR_INTERVAL_NS
	return !exemplar->stamp_ns || now_ns - exemplar->stamp_ns >= EXEMPLAR_INTERVAL_NS;
#else
	return false;
#endif
}

/* Rotating keeps two equal words from cancelling each other. */
static __always_inline u64 exemplar_fold(u64 check, u64 word)
{
	return ((check << 7) | (check >> 57)) ^ word;
}

static __always_inline void exemplar_store(struct exemplar *to, const struct exemplar *from)
{
	u64 check = 0;

	check = exemplar_fold(check, from->time_ns);
	check = exemplar_fold(check, from->value);
	check = exemplar_fold(check, from->pid);
	check = exemplar_fold(check, from->comm[0]);
	check = exemplar_fold(check, from->comm[1]);
	check = exemplar_fold(check, from->cgroup);
	for (int i = 0; i < EXEMPLAR_WORDS; i++)
		check = exemplar_fold(check, from->words[i]);
	*to = *from;
	to->check = check;
}

#endif
