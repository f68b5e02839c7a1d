/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Page cache, in pages: accesses by reads and faults, misses, additions, dirtied pages.
 *
 * A miss is a page that was asked for and had to be added for it. Readahead adds more pages than were asked for, so
 * misses are not additions: per task, an addition counts as a miss when the request during which it happened covers it.
 * mm_filemap_get_pages fires after the additions of its round, and again for each round of one read with the same end;
 * the request is counted at its first round, clamped to the file's size.
 */
#include "program.h"

#define PAGE_SHIFT 12

#ifndef HAVE_folio_mapping /* before 5.16 the page cache is made of pages */
#define folio page
#endif

enum counter { ACCESSES, MISSES, ADDED, DIRTIED, COUNTERS };
BPF_PERCPU_ARRAY(pages, u64, COUNTERS);

/* Atomic: fexit programs may be preempted by another task on the same CPU. */
static __always_inline void add(int counter, u64 amount)
{
	u64 *count = amount ? pages.lookup(&counter) : NULL;

	if (count)
		__sync_fetch_and_add(count, amount);
}

/* What a task is doing to the page cache. */
struct reading {
	u64 mapping; /* of the last request */
	u64 last;    /* its end, and the call that made it */
	u64 call;
	u64 index; /* where its last round began */
	u64 added_mapping; /* pages that the task added in a row since its last request … */
	u64 added_first;
	u64 added_end;
	u64 added_moment; /* … in one moment: no call and no fault ended in between */
	u64 fault_mapping; /* a fault that is not finished yet */
	u64 fault_index;
#ifdef HOOK_filemap_read_entry_kprobe
	u64 read_iocb;
	s64 read_before;
#endif
};
BPF_TASK_STORAGE(readings, struct reading);

static __always_inline struct reading *reading_of(struct task_struct *task)
{
	struct reading *reading = readings.task_storage_get(task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);

	if (!reading)
		lose(LOSS_TASK_STATE);
	return reading;
}

/* Grows when a read or write of the task ends: two requests of one call have the same number. */
static __always_inline u64 call_of(struct task_struct *task)
{
#ifdef HAVE_task_struct_ioac
	return READ(task, ioac.syscr) + READ(task, ioac.syscw);
#else
	return 0;
#endif
}

/* Grows also when a fault ends. */
static __always_inline u64 moment_of(struct task_struct *task)
{
	return call_of(task) + READ(task, maj_flt) + READ(task, min_flt);
}

static __always_inline u64 file_pages(struct address_space *mapping)
{
	struct inode *inode = READ(mapping, host);

	return (READ(inode, i_size) + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT;
}

static __always_inline u64 overlap(u64 first, u64 end, u64 other_first, u64 other_end)
{
	u64 from = first > other_first ? first : other_first;
	u64 to = end < other_end ? end : other_end;

	return to > from ? to - from : 0;
}

/* One request, or one round of it, for pages [first, end). */
static __always_inline void request(struct task_struct *task, u64 mapping, u64 first, u64 end)
{
	struct reading *reading = reading_of(task);
	u64 call = call_of(task);

	if (!reading) {
		add(ACCESSES, end > first ? end - first : 0);
		return;
	}
	if (!(reading->mapping == mapping && reading->last == end && reading->call == call && first > reading->index))
		add(ACCESSES, end > first ? end - first : 0);
	if (reading->added_mapping == mapping && reading->added_moment == moment_of(task))
		add(MISSES, overlap(first, end, reading->added_first, reading->added_end));
	reading->mapping = mapping;
	reading->last = end;
	reading->call = call;
	reading->index = first;
	reading->added_mapping = 0;
	reading->fault_mapping = 0;
}

static __always_inline void fault(struct task_struct *task, u64 mapping, u64 index)
{
	struct reading *reading = reading_of(task);

	add(ACCESSES, 1);
	if (!reading)
		return;
	reading->fault_mapping = mapping;
	reading->fault_index = index;
	reading->added_mapping = 0;
}

/* A fault maps the pages around it that are cached; the page of the fault itself has been counted already. */
static __always_inline void map_around(struct task_struct *task, struct address_space *mapping, u64 first, u64 last)
{
	struct reading *reading = reading_of(task);
	u64 end = last + 1, size = file_pages(mapping), count;

	if (end > size)
		end = size;
	count = end > first ? end - first : 0;
	if (reading && reading->fault_mapping == (u64)mapping) {
		count -= overlap(first, end, reading->fault_index, reading->fault_index + 1);
		reading->fault_mapping = 0;
	}
	add(ACCESSES, count);
}

#ifdef READ_FUNCTION
/* ssize_t filemap_read(struct kiocb *iocb, struct iov_iter *iter, ssize_t already_read): bytes, so pages, at its end. */
static __always_inline int read_ended(struct kiocb *iocb, s64 before, s64 result)
{
	s64 bytes = result - before, end;
	struct file *file;

	if (result <= 0 || bytes <= 0 || !counting())
		return 0;
	end = READ(iocb, ki_pos);
	file = READ(iocb, ki_filp);
	request(bpf_get_current_task_btf(), (u64)READ(file, f_mapping), (u64)(end - bytes) >> PAGE_SHIFT,
		(u64)(end + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT);
	return 0;
}

static __always_inline struct address_space *mapping_of(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = READ(vmf, vma);
	struct file *file = READ(vma, vm_file);

	return READ(file, f_mapping);
}

#ifdef HOOK_filemap_read_fexit
#define ARGUMENT(n, register) ctx[n]
PROGRAM(filemap_read)
{
	return read_ended((void *)ctx[0], ctx[2], ctx[3]);
}
#else
/* A kretprobe does not see the arguments any more, so the task remembers them. */
#define ARGUMENT(n, register) (((struct pt_regs *)ctx)->register)
PROGRAM(filemap_read_entry)
{
	struct reading *reading = reading_of(bpf_get_current_task_btf());

	if (reading) {
		reading->read_iocb = ARGUMENT(0, di);
		reading->read_before = ARGUMENT(2, dx);
	}
	return 0;
}

PROGRAM(filemap_read_return)
{
	struct reading *reading = reading_of(bpf_get_current_task_btf());

	return reading ? read_ended((void *)reading->read_iocb, reading->read_before, ARGUMENT(3, ax)) : 0;
}
#endif

/* vm_fault_t filemap_fault(struct vm_fault *vmf) */
PROGRAM(filemap_fault)
{
	struct vm_fault *vmf = (void *)ARGUMENT(0, di);

	if (counting())
		fault(bpf_get_current_task_btf(), (u64)mapping_of(vmf), READ(vmf, pgoff));
	return 0;
}

/* vm_fault_t filemap_map_pages(struct vm_fault *vmf, pgoff_t start, pgoff_t end) */
PROGRAM(filemap_map_pages)
{
	struct vm_fault *vmf = (void *)ARGUMENT(0, di);

	if (counting())
		map_around(bpf_get_current_task_btf(), mapping_of(vmf), ARGUMENT(1, si), ARGUMENT(2, dx));
	return 0;
}
#else
PROGRAM(mm_filemap_get_pages)
{
	struct address_space *mapping = (void *)ctx[0];
	u64 end = ctx[2], size;

	if (!counting())
		return 0;
	size = file_pages(mapping);
	request(bpf_get_current_task_btf(), (u64)mapping, ctx[1], end < size ? end : size);
	return 0;
}

PROGRAM(mm_filemap_fault)
{
	if (counting())
		fault(bpf_get_current_task_btf(), ctx[0], ctx[1]);
	return 0;
}

PROGRAM(mm_filemap_map_pages)
{
	if (counting())
		map_around(bpf_get_current_task_btf(), (void *)ctx[0], ctx[1], ctx[2]);
	return 0;
}
#endif

/* How many pages a folio has: 1 unless PG_head is set. */
static __always_inline u64 folio_pages(struct folio *folio)
{
#if defined(HAVE_folio__nr_pages) || defined(HAVE_folio__folio_nr_pages)
	struct word { u64 bits; } *flags = (void *)folio; /* the first field, a struct of its own from 6.18 on */

	if (!(READ(flags, bits) & 1UL << PG_head))
		return 1;
#ifdef HAVE_folio__nr_pages
	return READ(folio, _nr_pages);
#else
	return READ(folio, _folio_nr_pages);
#endif
#else
	return 1; /* before folios, the page cache adds and dirties page by page */
#endif
}

PROGRAM(mm_filemap_add_to_page_cache)
{
	struct folio *folio = (void *)ctx[0];
	struct task_struct *task = bpf_get_current_task_btf();
	struct reading *reading;
	u64 mapping, index, count, moment;

	if (!counting())
		return 0;
	mapping = (u64)READ(folio, mapping);
	index = READ(folio, index);
	count = folio_pages(folio);
	add(ADDED, count);
	reading = reading_of(task);
	if (!reading)
		return 0;
	if (reading->fault_mapping == mapping && overlap(index, index + count, reading->fault_index, reading->fault_index + 1)) {
		add(MISSES, 1);
		return 0;
	}
	moment = moment_of(task);
	if (reading->added_mapping == mapping && reading->added_moment == moment && reading->added_end == index) {
		reading->added_end = index + count;
		return 0;
	}
	reading->added_mapping = mapping;
	reading->added_moment = moment;
	reading->added_first = index;
	reading->added_end = index + count;
	return 0;
}

PROGRAM(writeback_dirty_folio)
{
	if (counting())
		add(DIRTIED, folio_pages((void *)ctx[0]));
	return 0;
}
