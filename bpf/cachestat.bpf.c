/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Page cache, in pages: accesses by reads and faults, misses, additions, dirtied pages.
 *
 * A miss is a page that was asked for and had to be added for it. Readahead adds more pages than were asked for, so
 * misses are not additions: per task, additions wait until the request during which they happened tells its range.
 * mm_filemap_get_pages fires after the additions of its round, and again for each round of one read with the same end;
 * the request is counted at its first round, clamped to the file's size.
 *
 * A fault on a mapped file is one access, of the page that was touched. The kernel also maps cached pages around it;
 * nobody asked for those (mm_filemap_map_pages names the whole window, mapped or not, again and again while holes are
 * in it).
 */
#ifndef HAVE_task_struct_bpf_storage /* before 5.12 tasks have no storage, and no helper gives the task as a type */
#undef DIRECT_READS
#define bpf_get_current_task_btf() ((struct task_struct *)bpf_get_current_task())
#endif
#include "program.h"

#define PAGE_SHIFT 12
#define TMPFS_MAGIC 0x01021994
#define OVERLAYFS_SUPER_MAGIC 0x794c7630
#define S_IFMT 0170000
#define S_IFBLK 0060000

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

/* Pages in the order of the file, one bit each; 4 MiB are more than one readahead reads. */
#define WORDS 16
#define PLACES (WORDS * 64)

/* What a task is doing to the page cache. */
struct reading {
	u64 mapping; /* of the last request */
	u64 first;   /* its range, and the call that made it */
	u64 end;
	u64 call;
	u64 index;    /* where its last round began */
	u64 switches; /* how often the task had waited by then */
	u64 ahead_mapping; /* up to where it added pages last, which may still be on their way */
	u64 ahead_end;
	u64 fault;    /* faults that the task had before the one that is not finished yet, plus 1 */
	u64 fault_mapping;
	u64 fault_index;
	u64 added_mapping; /* what it added since, from page added_first on … */
	u64 added_first;
	u64 added_reason; /* … in this system call */
	u64 added[WORDS];
	u64 beyond; /* pages behind those bits, up to beyond_end */
	u64 beyond_end;
#ifdef HOOK_filemap_read_entry_kprobe
	u64 read_iocb;
	s64 read_before;
#endif
};
#ifdef HAVE_task_struct_bpf_storage
BPF_TASK_STORAGE(readings, struct reading);
#else
BPF_TABLE("lru_hash", u64, struct reading, readings, 16384); /* by thread */
#endif

static __always_inline struct reading *reading_of(struct task_struct *task)
{
#ifdef HAVE_task_struct_bpf_storage
	struct reading *reading = readings.task_storage_get(task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
#else
	struct reading zero = {}, *reading;
	u64 thread = bpf_get_current_pid_tgid();

	reading = readings.lookup_or_try_init(&thread, &zero);
#endif
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

#define FAR(pointer, field)                                                                  \
	({                                                                                   \
		typeof((pointer)->field) __value = 0;                                        \
		bpf_probe_read_kernel(&__value, sizeof(__value), (void *)&(pointer)->field); \
		__value;                                                                     \
	})

/* System calls of x86_64 that read from a file. */
enum { CALL_read = 0, CALL_pread64 = 17, CALL_readv = 19, CALL_sendfile = 40, CALL_preadv = 295, CALL_preadv2 = 327 };

static __always_inline u64 system_call(struct task_struct *task)
{
#ifdef BPF_FUNC_task_pt_regs
	struct pt_regs *registers = (void *)bpf_task_pt_regs(task);

	return READ(registers, orig_ax);
#else /* before 5.15: they lie at the end of the task's stack, of 16 KiB */
	struct pt_regs *registers = (void *)((u64)FAR(task, stack) + (16 << 10) - sizeof(*registers));

	return FAR(registers, orig_ax);
#endif
}

/* The next piece of the same sendfile may begin with the page that the one before ended with: it is asked for once. */
static __always_inline bool goes_on(struct task_struct *task, struct reading *reading, u64 mapping, u64 index, u64 call)
{
	return reading->mapping == mapping && reading->call == call && reading->end == index + 1 &&
	       system_call(task) == CALL_sendfile;
}

/* Tells additions by a read from those by a write, fadvise or readahead before it. */
static __always_inline u64 reason_of(struct task_struct *task)
{
	u64 number = system_call(task);

#ifdef READ_FUNCTION /* a read that failed tells nothing: what it added is not a miss of the next */
	number += call_of(task) << 10;
#endif
	return number;
}

/* Grows when a fault of the task ends, and not when it is tried again. */
static __always_inline u64 faults_of(struct task_struct *task)
{
	return READ(task, maj_flt) + READ(task, min_flt);
}

static __always_inline u64 overlap(u64 first, u64 end, u64 other_first, u64 other_end)
{
	u64 from = first > other_first ? first : other_first;
	u64 to = end < other_end ? end : other_end;

	return to > from ? to - from : 0;
}

static __always_inline u64 ones(u64 bits)
{
	bits -= bits >> 1 & 0x5555555555555555;
	bits = (bits & 0x3333333333333333) + (bits >> 2 & 0x3333333333333333);
	bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0f;
	return bits * 0x0101010101010101 >> 56;
}

/* The lowest n bits; n may be negative or more than 64. */
static __always_inline u64 lowest(s64 n)
{
	u64 bits = (1ULL << (n & 63)) - 1;
	s64 positive = -n, full = 63 - n; /* by their signs: with branches, the verifier follows every combination of them */

	HIDE(positive);
	HIDE(full);
	return (bits | full >> 63) & positive >> 63;
}

/* A request, or one round of it, covers [first, end): what of it the task added, it missed. */
static __always_inline void miss(struct reading *reading, struct task_struct *task, u64 mapping, u64 first, u64 end)
{
	u64 base = reading->added_first, missed = 0, covered;

	reading->fault = 0;
	if (!reading->added_mapping)
		return;
	if (reading->added_mapping == mapping && reading->added_reason == reason_of(task)) {
#pragma nounroll
		for (int i = 0; i < WORDS; i++, base += 64)
			missed += ones(reading->added[i] & lowest(end - base) & ~lowest(first - base));
		covered = overlap(first, end, base, reading->beyond_end);
		missed += covered < reading->beyond ? covered : reading->beyond;
	}
	reading->added_mapping = 0;
	add(MISSES, missed);
}

static __always_inline bool is_block_device(struct address_space *mapping)
{
	struct inode *inode = READ(mapping, host);

	return (READ(inode, i_mode) & S_IFMT) == S_IFBLK;
}

/* A folio's number of pages is a power of two, and its index a multiple of that. */
static __always_inline void added(struct reading *reading, struct task_struct *task, struct address_space *mapping,
				  u64 index, u64 count)
{
	u64 reason = reason_of(task), place;

	bool other = reading->added_mapping != (u64)mapping;

	/* To read a file, its file system may have to read blocks of its own in between. */
	if (other && reading->added_mapping && reading->added_reason == reason && is_block_device(mapping))
		return;
	if (other || reading->added_reason != reason || index < reading->added_first) {
		reading->added_mapping = (u64)mapping;
		reading->added_reason = reason;
		reading->added_first = index & ~63ULL;
		reading->beyond = 0;
		__builtin_memset(reading->added, 0, sizeof(reading->added));
	}
	reading->ahead_mapping = (u64)mapping;
	reading->ahead_end = index + count;
	place = index - reading->added_first;
	if (place + count > PLACES) {
		reading->beyond += place + count - (place > PLACES ? place : PLACES);
		reading->beyond_end = index + count;
	}
	if (place < PLACES && count < 64) {
		reading->added[(place / 64) & (WORDS - 1)] |= lowest(count) << (place & 63);
	} else {
#pragma nounroll
		for (int i = 0; i < WORDS; i++)
			reading->added[i] |= lowest(place + count - i * 64) & ~lowest(place - i * 64);
	}
}

/* The first event of a fault counts, the fault itself or the mapping around it: a fault is tried several times. */
static __always_inline void fault(u64 mapping, u64 index)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct reading *reading = reading_of(task);
	u64 now = faults_of(task) + 1;

	if (!reading || reading->fault != now)
		add(ACCESSES, 1);
	if (!reading)
		return;
	reading->fault = now;
	reading->fault_mapping = mapping;
	reading->fault_index = index;
}

#define ANY_PAGE ~0ULL

#define MAGIC_OF(mapping, read)                                       \
	({                                                            \
		struct inode *__inode = read(mapping, host);          \
		struct super_block *__super = read(__inode, i_sb);    \
		read(__super, s_magic);                               \
	})

/* tmpfs has nothing behind it and its reads are not seen here, so that its faults do not count either. */
static __always_inline void map_around(struct address_space *mapping)
{
	if (MAGIC_OF(mapping, READ) != TMPFS_MAGIC)
		fault((u64)mapping, ANY_PAGE);
}

#ifdef READ_FUNCTION
/* A function that read `bytes` up to `end`: bytes, so pages, once a call. */
static __always_inline int read_ended(struct file *file, s64 end, s64 bytes)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct reading *reading;
	u64 first, behind, mapping, call;

	if (bytes <= 0 || !counting())
		return 0;
	mapping = (u64)READ(file, f_mapping);
	first = (u64)(end - bytes) >> PAGE_SHIFT;
	behind = ((u64)(end - 1) >> PAGE_SHIFT) + 1;
	reading = reading_of(task);
	if (!reading) {
		add(ACCESSES, behind - first);
		return 0;
	}
	call = call_of(task);
	if (goes_on(task, reading, mapping, first, call))
		first++;
	add(ACCESSES, behind - first);
	reading->mapping = mapping;
	reading->end = behind;
	reading->call = call;
	miss(reading, task, mapping, first, behind);
	return 0;
}

#ifdef HOOK_filemap_read_fexit
/* ssize_t filemap_read(struct kiocb *iocb, struct iov_iter *iter, ssize_t already_read) */
PROGRAM(filemap_read)
{
	struct kiocb *iocb = (void *)ctx[0];
	s64 result = ctx[3];

	return result > 0 ? read_ended(READ(iocb, ki_filp), READ(iocb, ki_pos), result - (s64)ctx[2]) : 0;
}

/* ssize_t filemap_splice_read(struct file *in, loff_t *ppos, struct pipe_inode_info *pipe, size_t len, unsigned flags) */
PROGRAM(filemap_splice_read)
{
	s64 end = 0;

	bpf_probe_read_kernel(&end, sizeof(end), (void *)ctx[1]);
	return read_ended((void *)ctx[0], end, ctx[5]);
}
#else
#define REGISTER(name) (((struct pt_regs *)ctx)->name)
/* A kretprobe does not see the arguments any more, so the task remembers them. */
PROGRAM(filemap_read_entry)
{
	struct reading *reading = reading_of(bpf_get_current_task_btf());

	if (reading) {
		reading->read_iocb = REGISTER(di);
		reading->read_before = REGISTER(dx);
	}
	return 0;
}

PROGRAM(filemap_read_return)
{
	struct reading *reading = reading_of(bpf_get_current_task_btf());
	struct kiocb *iocb = reading ? (void *)reading->read_iocb : NULL;
	s64 result = REGISTER(ax);

	return iocb && result > 0 ? read_ended(READ(iocb, ki_filp), READ(iocb, ki_pos), result - reading->read_before) : 0;
}
#endif
#else
/*
 * A round that finds cached pages and then has to wait for a page on its way gives those before it without an event
 * ("err:" in filemap_get_pages). So where there was a wait, or readahead is under way, a request may have begun before
 * its first event.
 */
static __always_inline bool may_be_late(struct reading *reading, u64 mapping, u64 index, u64 switches)
{
	return switches != reading->switches || (mapping == reading->ahead_mapping && index < reading->ahead_end);
}

/* Where a request began whose first event says `index`: the system call tells. */
static __always_inline u64 start_of(struct task_struct *task, struct reading *reading, u64 mapping, u64 index, u64 call)
{
	struct pt_regs *registers = (void *)bpf_task_pt_regs(task);
	u64 number = READ(registers, orig_ax), descriptor = READ(registers, di), position = READ(registers, r10);
	bool same_call = reading->mapping == mapping && reading->call == call;
	struct address_space *opened;
	struct files_struct *files;
	struct fdtable *table;
	struct file *file = NULL;

	if (number == CALL_sendfile) {
		if (same_call) /* the next piece of it */
			return index < reading->end ? index : reading->end;
		descriptor = READ(registers, si);
		position = READ(registers, dx);
		if (!position)
			position = -1;
		else if (bpf_probe_read_user(&position, sizeof(position), (void *)position))
			return index;
	} else if (number == CALL_read || number == CALL_readv) {
		position = -1;
	} else if (number != CALL_pread64 && number != CALL_preadv && number != CALL_preadv2) {
		return index;
	}
	files = READ(task, files);
	table = FAR(files, fdt);
	bpf_probe_read_kernel(&file, sizeof(file), (void *)((u64)FAR(table, fd) + descriptor * sizeof(file)));
	if (same_call)
		return index;
	opened = FAR(file, f_mapping);
	/* overlayfs reads another file, at the same position. */
	if ((u64)opened != mapping && MAGIC_OF(opened, FAR) != OVERLAYFS_SUPER_MAGIC)
		return index;
	if (position == -1) /* the file's own */
		position = FAR(file, f_pos);
	position >>= PAGE_SHIFT;
	return position < index ? position : index;
}

static __always_inline u64 file_pages(struct address_space *mapping)
{
	struct inode *inode = READ(mapping, host);

	return (READ(inode, i_size) + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT;
}

/*
 * Whether `last_index` is the last page or the one after it: kernels differ ("filemap: fix the last_index of
 * mm_filemap_get_pages"), and only a read of a single page shows which this is. The first program that starts shows it.
 */
BPF_ARRAY(last_included, u64, 1);

PROGRAM(mm_filemap_get_pages)
{
	struct address_space *mapping = (void *)ctx[0];
	struct task_struct *task = bpf_get_current_task_btf();
	u64 index = ctx[1], end = ctx[2], call, switches;
	struct reading *reading;
	int only = 0;
	u64 *included = last_included.lookup(&only);

	if (!included || !counting())
		return 0;
	if (!*included && index == end)
		*included = 1;
	end += *included;
	reading = reading_of(task);
	if (!reading) {
		add(ACCESSES, overlap(index, end, 0, file_pages(mapping)));
		return 0;
	}
	call = call_of(task);
	switches = READ(task, nvcsw);
	if (!(reading->mapping == (u64)mapping && reading->end == end && reading->call == call && index > reading->index)) {
		reading->first = index;
		if (goes_on(task, reading, (u64)mapping, index, call))
			reading->first = reading->end;
		else if (may_be_late(reading, (u64)mapping, index, switches))
			reading->first = start_of(task, reading, (u64)mapping, index, call);
		add(ACCESSES, overlap(reading->first, end, 0, file_pages(mapping)));
	}
	reading->mapping = (u64)mapping;
	reading->end = end;
	reading->call = call;
	reading->index = index;
	reading->switches = switches;
	miss(reading, task, (u64)mapping, reading->first, end);
	return 0;
}

#endif

#if defined(HOOK_filemap_map_pages_fentry) || defined(HOOK_filemap_map_pages_kprobe)
#ifdef HOOK_filemap_map_pages_fentry
#define FAULT (struct vm_fault *)ctx[0]
#else
#define FAULT (struct vm_fault *)((struct pt_regs *)ctx)->di
#endif

static __always_inline struct address_space *mapping_of(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = READ(vmf, vma);
	struct file *file = READ(vma, vm_file);

	return READ(file, f_mapping);
}

/* vm_fault_t filemap_fault(struct vm_fault *vmf) */
PROGRAM(filemap_fault)
{
	struct vm_fault *vmf = FAULT;

	if (counting())
		fault((u64)mapping_of(vmf), READ(vmf, pgoff));
	return 0;
}

/* vm_fault_t filemap_map_pages(struct vm_fault *vmf, pgoff_t start, pgoff_t end) */
PROGRAM(filemap_map_pages)
{
	if (counting())
		map_around(mapping_of(FAULT));
	return 0;
}
#endif

PROGRAM(mm_filemap_fault)
{
	if (counting())
		fault(ctx[0], ctx[1]);
	return 0;
}

/* It does not tell of a fault that maps a huge page (filemap_map_pmd): the function does. */
PROGRAM(mm_filemap_map_pages)
{
	if (counting())
		map_around((void *)ctx[0]);
	return 0;
}

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
	struct address_space *mapping;
	struct reading *reading;
	u64 index, count;

	if (!counting())
		return 0;
	mapping = READ(folio, mapping);
	index = READ(folio, index);
	count = folio_pages(folio);
	add(ADDED, count);
	reading = reading_of(task);
	if (!reading)
		return 0;
	if (reading->fault != faults_of(task) + 1)
		added(reading, task, mapping, index, count);
	else if (reading->fault_mapping == (u64)mapping && reading->fault_index - index < count)
		add(MISSES, 1);
	return 0;
}

PROGRAM(writeback_dirty_folio)
{
	if (counting())
		add(DIRTIED, folio_pages((void *)ctx[0]));
	return 0;
}
