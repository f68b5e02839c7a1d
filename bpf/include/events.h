/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* A ring buffer of events for the journal. It is pinned, so events wait in it while the server is down. */
#ifndef BPFMETRICSD_EVENTS_H
#define BPFMETRICSD_EVENTS_H

/*
 * EVENTS(name, type, pages): ring `name` of records of `type`. `name_layout` is never pinned or used; bcc describes its value,
 * and so tells the loader how a record reads.
 */
#define EVENTS(name, type, pages)          \
	BPF_RINGBUF_OUTPUT(name, pages);   \
	BPF_ARRAY(name##_layout, type, 1)

#endif
