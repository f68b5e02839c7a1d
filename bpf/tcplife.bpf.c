/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * TCP connections: how long they lived, payload each way, opened and closed, by family, direction and port.
 *
 * A connection begins at SYN_SENT (outbound) or SYN_RECV (inbound) and counts from ESTABLISHED to CLOSE. The socket's
 * address is used again by later ones, so a beginning overwrites. The current task at CLOSE is unrelated (often an
 * interrupt), so pid and comm are taken when the task itself acts: at SYN_SENT, FIN_WAIT1 and LAST_ACK.
 */
#include "program.h"
#include "histogram.h"
#include "tcp.h"
#define EXEMPLAR_WORDS 6 /* struct endpoints */
#include "exemplar.h"
#include "events.h"
#include "twice.h"

enum {
	TCP_ESTABLISHED = 1, TCP_SYN_SENT, TCP_SYN_RECV, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_TIME_WAIT, TCP_CLOSE,
	TCP_CLOSE_WAIT, TCP_LAST_ACK, TCP_LISTEN, TCP_CLOSING
};
enum direction { INBOUND, OUTBOUND, DIRECTIONS };

struct connection {
	u64 began_ns;
	u64 pid;
	u64 comm[2];
	s64 sequence_base; /* what sequence() gives before any payload was sent */
	u32 direction;
	u32 established;
};

struct connections {
	struct seconds_histogram duration;
	struct bytes_histogram sent;
	struct bytes_histogram received;
	u64 opened;
#ifdef EXEMPLAR_INTERVAL_NS
	struct exemplar duration_exemplars[SECONDS_EXEMPLARS];
	struct exemplar sent_exemplars[BYTES_EXEMPLARS];
	struct exemplar received_exemplars[BYTES_EXEMPLARS];
#endif
};

/* A hash because a connection's identity is its socket's address; preallocated, since packets arrive in interrupts. */
BPF_TABLE("hash", u64, struct connection, open_connections, MAX_CONNECTIONS);
/* Index: (family * DIRECTIONS + direction) * PORTS + port. Not per CPU: a connection is far dearer than an increment. */
BPF_ARRAY(connections, struct connections, FAMILIES *DIRECTIONS *PORTS);
/* Only for the seeding of connections that are older than the programs: ports that somebody listens on. */
BPF_TABLE("hash", u16, u8, listening, 4096);

#ifdef EVENTS_ON
struct connection_event {
	u64 time_ns; /* CLOCK_BOOTTIME, at the end */
	u64 duration_ns;
	u64 sent;
	u64 received;
	u64 pid;
	u64 comm[2];
	u64 cgroup;
	struct endpoints ends;
	u32 direction;
};
EVENTS(events, struct connection_event, RING_PAGES);
#endif

/* The place of a local port among those with a label value of their own; the last place is for all others. */
static __always_inline int port_place(u16 port)
{
	switch (port) {
		PORT_CASES
	default:
		return PORTS - 1;
	}
}

static __always_inline struct connections *connections_of(u32 family, u32 direction, u16 local_port)
{
	int index = (family * DIRECTIONS + direction) * PORTS + port_place(local_port);

	return connections.lookup(&index);
}

static __always_inline void take_task(struct connection *connection)
{
	connection->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(&connection->comm, sizeof(connection->comm));
}

/* Not skc_num, which is 0 at CLOSE. */
static __always_inline u16 local_port_of(struct tcp_sock *tp)
{
	return swap16(READ(tp, inet_conn.icsk_inet.inet_sport));
}

/* The kernel counts the SYN of the side that connects among its acknowledged bytes, and not that of the other side. */
static __always_inline void begin(u64 key, u32 direction)
{
	struct connection fresh = { .began_ns = bpf_ktime_get_ns(), .direction = direction };

	if (direction == OUTBOUND) {
		fresh.sequence_base = 1;
		take_task(&fresh);
	}
	if (open_connections.update(&key, &fresh))
		lose(LOSS_MAP_FULL);
}

/*
 * How far the socket has come in its own sequence, a FIN that was sent aside. Not bytes_sent - bytes_retrans: a first
 * transmission that fails in this host (a firewall's no, a full queue) is in bytes_sent, and again when it is repeated.
 */
static __always_inline s64 sequence(struct tcp_sock *tp, int state)
{
	u32 next = READ(tp, snd_nxt), unacknowledged = next - READ(tp, snd_una);
	bool closing = state == TCP_FIN_WAIT1 || state == TCP_FIN_WAIT2 || state == TCP_CLOSING || state == TCP_LAST_ACK;

	/* A FIN is the last in the queue, so it was sent when all was. */
	return READ(tp, bytes_acked) + unacknowledged - (closing && next == READ(tp, write_seq));
}

static __always_inline void opened(struct sock *sk, struct tcp_sock *tp, struct connection *connection)
{
	struct endpoints ends = {};
	struct connections *into;

	connection->established = 1;
	read_endpoints(&ends, &sk->__sk_common, local_port_of(tp));
	into = connections_of(ends.family, connection->direction, (u16)ends.ports);
	if (into)
		__sync_fetch_and_add(&into->opened, 1);
}

#ifdef EXEMPLAR_INTERVAL_NS
static __always_inline void remember(struct exemplar *exemplar, u64 value, u64 now, const struct endpoints *ends,
				     const struct connection *connection, u64 cgroup)
{
	struct exemplar fresh = { .stamp_ns = now, .value = value, .cgroup = cgroup };

	if (!exemplar_due(exemplar, now))
		return;
	fresh.time_ns = bpf_ktime_get_boot_ns();
	fresh.pid = connection->pid;
	fresh.comm[0] = connection->comm[0];
	fresh.comm[1] = connection->comm[1];
	__builtin_memcpy(fresh.words, ends, sizeof(fresh.words));
	exemplar_store(exemplar, &fresh);
}
#define REMEMBER(of, octave, value)                                                                   \
	do {                                                                                          \
		u32 __octave = (octave);                                                              \
		HIDE(__octave);                                                                       \
		if (__octave < sizeof(into->of##_exemplars) / sizeof(struct exemplar))                \
			remember(&into->of##_exemplars[__octave], (value), now, &ends, connection, cgroup); \
	} while (0)
#else
#define REMEMBER(of, octave, value) (void)(octave)
#endif

static __always_inline void closed(struct sock *sk, struct tcp_sock *tp, struct connection *connection, int state)
{
	u64 now = bpf_ktime_get_ns(), cgroup = socket_cgroup(sk);
	u64 duration_ns = now - connection->began_ns;
	u64 sent = sequence(tp, state) - connection->sequence_base;
	u64 received = READ(tp, bytes_received);
	struct endpoints ends = {};
	struct connections *into;
	u32 octave;

	if (received && READ(sk, __sk_common.skc_flags) & 1 << SOCK_DONE) /* a FIN has arrived, and is counted */
		received--;
	read_endpoints(&ends, &sk->__sk_common, local_port_of(tp));
	into = connections_of(ends.family, connection->direction, (u16)ends.ports);
	if (!into)
		return;
	octave = OBSERVE_SECONDS(&into->duration, duration_ns);
	REMEMBER(duration, octave, duration_ns);
	octave = OBSERVE_BYTES(&into->sent, sent);
	REMEMBER(sent, octave, sent);
	octave = OBSERVE_BYTES(&into->received, received);
	REMEMBER(received, octave, received);
#ifdef EVENTS_ON
	struct connection_event *event = events.ringbuf_reserve(sizeof(*event));

	if (!event) {
		lose(LOSS_RING_FULL);
		return;
	}
	event->time_ns = bpf_ktime_get_boot_ns();
	event->duration_ns = duration_ns;
	event->sent = sent;
	event->received = received;
	event->pid = connection->pid;
	event->comm[0] = connection->comm[0];
	event->comm[1] = connection->comm[1];
	event->cgroup = cgroup;
	event->ends = ends;
	event->direction = connection->direction;
	events.ringbuf_submit(event, 0);
#endif
}

PROGRAM_TWICE(inet_sock_set_state)
{
	struct sock *sk = (void *)ctx[0];
	int old = (int)ctx[1], new = (int)ctx[2];
	struct connection *connection;
	struct tcp_sock *tp;
	u64 key = (u64)sk;

	if (!counting() || READ(sk, sk_protocol) != IPPROTO_TCP || old == TCP_LISTEN && new == TCP_CLOSE)
		return 0;
	if (new == TCP_SYN_SENT || (new == TCP_SYN_RECV && old != TCP_SYN_SENT)) {
		begin(key, new == TCP_SYN_SENT ? OUTBOUND : INBOUND);
		return 0;
	}
	if (new == TCP_LISTEN)
		return 0;
	connection = open_connections.lookup(&key);
	if (!connection && new == TCP_ESTABLISHED) { /* began a moment before the programs did */
		begin(key, old == TCP_SYN_SENT ? OUTBOUND : INBOUND);
		connection = open_connections.lookup(&key);
	}
	tp = TCP_SOCK(sk);
	if (!connection || !tp)
		return 0;
	/* With TCP Fast Open a server may be done before the handshake is. */
	if (new == TCP_ESTABLISHED || (new == TCP_FIN_WAIT1 && old == TCP_SYN_RECV))
		opened(sk, tp, connection);
	if (new == TCP_FIN_WAIT1 || new == TCP_LAST_ACK)
		take_task(connection);
	else if (new == TCP_CLOSE) {
		if (connection->established)
			closed(sk, tp, connection, old);
		open_connections.delete(&key);
	}
	return 0;
}

/*
 * Runs once after loading, over all sockets: listeners come first. Connections that are older than the programs are known
 * from now on, with their age counted from now ("at least"), inbound where their port is listened on.
 */
#ifdef HOOK_seed_iter
PROGRAM(seed)
{
	struct sock_common *common = (void *)ctx[1];
	struct connection known = { .began_ns = bpf_ktime_get_ns(), .direction = OUTBOUND, .established = 1 };
	struct tcp_sock *tp;
	u64 key;
	u16 port;
	u8 yes = 1;

	if (!common)
		return 0;
	tp = bpf_skc_to_tcp_sock(common);
	if (!tp)
		return 0;
	key = (u64)common;
	if (common->skc_state == TCP_LISTEN) {
		port = common->skc_num;
		listening.update(&port, &yes);
		return 0;
	}
	if (common->skc_state == TCP_SYN_SENT || common->skc_state == TCP_SYN_RECV)
		return 0;
	port = local_port_of(tp);
	if (listening.lookup(&port))
		known.direction = INBOUND;
	known.sequence_base = sequence(tp, common->skc_state) - (tp->bytes_sent - tp->bytes_retrans);
	if (open_connections.insert(&key, &known) && !open_connections.lookup(&key))
		lose(LOSS_MAP_FULL);
	return 0;
}
#endif
