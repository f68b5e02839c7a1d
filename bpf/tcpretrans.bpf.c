/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * Retransmitted TCP segments by family, state and kind, as RetransSegs in /proc/net/snmp counts them.
 *
 * tcp_retransmit_skb sits where every retransmission passes, loss probes included; it may carry several segments.
 * From 6.18 on it fires for every attempt and tells the error. SYN-ACKs have a tracepoint of their own. The current
 * task means nothing here, so exemplars carry addresses and the socket's cgroup, no pid.
 */
#include "program.h"
#include "tcp.h"
#define EXEMPLAR_WORDS 6 /* struct endpoints */
#include "exemplar.h"
#include "events.h"

#define EAGAIN 11
#define ENOMEM 12
#define EBUSY 16
#define EINVAL 22
#define EHOSTUNREACH 113
#define TCP_SYN_SENT 2
#define TCP_SYN_RECV 3
#define STATES 16
#define ICSK_TIME_LOSS_PROBE 5 /* include/net/inet_connection_sock.h */
#define TCPCB_LOST 4           /* include/net/tcp.h */
#define TCPCB_EVER_RETRANS 0x80

enum kind { KIND_DATA, KIND_SYN, KIND_SYNACK, KIND_PROBE, KINDS };

struct retransmits {
	u64 segments;
#ifdef EXEMPLAR_INTERVAL_NS
	struct exemplar segments_exemplar;
#endif
};

/* Index: (family * STATES + state) * KINDS + kind. Not per CPU: retransmissions are rare. */
BPF_ARRAY(retransmits, struct retransmits, FAMILIES *STATES *KINDS);
BPF_ARRAY(failures, u64, FAMILIES);

/*
 * The kernel's own account is one of each network namespace. Here is ours for the loader's: its inode number, which the
 * loader writes, and the segments that its sockets have sent again.
 */
enum namespace_word { NAMESPACE_INODE, NAMESPACE_SEGMENTS, NAMESPACE_WORDS };
BPF_ARRAY(net_namespace, u64, NAMESPACE_WORDS);

#if defined(BY_REMOTE_SUBNET) || defined(BY_LOCAL_PORT)
struct retransmits_key {
	u64 by[2]; /* network, or port in the first word */
	u32 index; /* as in the array */
};
/* A hash because peers and ports are open-ended; what does not fit counts in the array. */
BPF_TABLE("hash", struct retransmits_key, struct retransmits, retransmits_by, MAX_SERIES);
#endif

#ifdef EVENTS_ON
struct retransmit_event {
	u64 time_ns; /* CLOCK_BOOTTIME */
	struct endpoints ends;
	u32 state;
	u32 kind;
	u32 segments;
};
EVENTS(events, struct retransmit_event, RING_PAGES);
#endif

static __always_inline struct retransmits *retransmits_of(const struct endpoints *ends, int index)
{
#if defined(BY_REMOTE_SUBNET) || defined(BY_LOCAL_PORT)
	struct retransmits_key key = { .index = index };
	struct retransmits *own, zero = {};

#ifdef BY_LOCAL_PORT
	key.by[0] = (u16)ends->ports;
#else
	/* 24 bits of IPv4, 64 of IPv6, in network order */
	key.by[0] = ends->family == FAMILY_IPV4 ? ends->remote[0] & 0xffffff : ends->remote[0];
#endif
	own = retransmits_by.lookup_or_try_init(&key, &zero);
	if (own)
		return own;
#endif
	return retransmits.lookup(&index);
}

static __always_inline void count_by_namespace(struct sock *sk, u32 segments)
{
	int at_inode = NAMESPACE_INODE, at_segments = NAMESPACE_SEGMENTS;
	u64 *inode = net_namespace.lookup(&at_inode), *into = net_namespace.lookup(&at_segments);
	struct net *net = NULL;
	u32 own = 0;

	/* skc_net is a struct without a name around the pointer, bytes to the verifier. */
	bpf_probe_read_kernel(&net, sizeof(net), (void *)&sk->__sk_common.skc_net);
	bpf_probe_read_kernel(&own, sizeof(own), (void *)&net->ns.inum);
	if (inode && into && *inode == own)
		__sync_fetch_and_add(into, segments);
}

static __always_inline void count(struct sock *sk, const struct endpoints *ends, u32 state, u32 kind, u32 segments)
{
	int index = (ends->family * STATES + (state & (STATES - 1))) * KINDS + kind;
	struct retransmits *into = retransmits_of(ends, index);
	u64 now;

	count_by_namespace(sk, segments);
	if (!into)
		return;
	__sync_fetch_and_add(&into->segments, segments);
#if defined(EXEMPLAR_INTERVAL_NS) || defined(EVENTS_ON)
	now = bpf_ktime_get_boot_ns();
#endif
#ifdef EXEMPLAR_INTERVAL_NS
	if (exemplar_due(&into->segments_exemplar, now)) {
		struct exemplar fresh = { .stamp_ns = now, .time_ns = now, .value = segments };

		fresh.cgroup = socket_cgroup(sk);
		__builtin_memcpy(fresh.words, ends, sizeof(fresh.words));
		exemplar_store(&into->segments_exemplar, &fresh);
	}
#endif
#ifdef EVENTS_ON
	struct retransmit_event *event = events.ringbuf_reserve(sizeof(*event));

	if (!event) {
		lose(LOSS_RING_FULL);
		return;
	}
	event->time_ns = now;
	event->ends = *ends;
	event->state = state;
	event->kind = kind;
	event->segments = segments;
	events.ringbuf_submit(event, 0);
#endif
}

/* The control block is bytes to the verifier, so a helper reads it. */
#define READ_CB(skb, field)                                                                                       \
	({                                                                                                        \
		typeof(((struct tcp_skb_cb *)0)->field) __value = 0;                                              \
		bpf_probe_read_kernel(&__value, sizeof(__value),                                                  \
				      (void *)(skb)->cb + __builtin_offsetof(struct tcp_skb_cb, field));          \
		__value;                                                                                          \
	})

/*
 * tcp_send_loss_probe() repeats the last segment while its own timer is still the pending one. That timer may be pending
 * when a fast retransmit begins, too; but what any other path sends again has been marked lost.
 */
static __always_inline bool is_loss_probe(struct sock *sk, struct sk_buff *skb)
{
	struct tcp_sock *tp = TCP_SOCK(sk);

	return tp && READ(tp, inet_conn.icsk_pending) == ICSK_TIME_LOSS_PROBE && !(READ_CB(skb, sacked) & TCPCB_LOST);
}

/*
 * __tcp_retransmit_skb() gives up before it counts and sends anything where the first transmission still waits in this
 * host (EBUSY), there is no route (EHOSTUNREACH), the window is closed (EAGAIN), or no memory to split the packet
 * (ENOMEM): neither RetransSegs nor TCPRetransFail knows these attempts. What is below TCP (netfilter, xfrm) may fail
 * with the same errors, but then the packet has been marked, and stamped not before the time of this attempt.
 */
static __always_inline bool before_sending(struct sock *sk, struct sk_buff *skb, s32 error)
{
	struct tcp_sock *tp = TCP_SOCK(sk);

	if (error != -EBUSY && error != -EHOSTUNREACH && error != -EAGAIN && error != -ENOMEM && error != -EINVAL)
		return false;
	return !tp || !(READ_CB(skb, sacked) & TCPCB_EVER_RETRANS) || READ(skb, tstamp) < READ(tp, tcp_clock_cache);
}

PROGRAM(tcp_retransmit_skb)
{
	struct sock *sk = (void *)ctx[0];
	struct sk_buff *skb = (void *)ctx[1];
	struct endpoints ends = {};
	u32 segments, state, kind = KIND_DATA;

	if (!counting())
		return 0;
	segments = READ_CB(skb, tcp_gso_segs); /* tcp_skb_pcount() */
	read_endpoints(&ends, &sk->__sk_common, READ(sk, __sk_common.skc_num));
#if ARGS_tcp_retransmit_skb > 2
	if (before_sending(sk, skb, ctx[2]))
		return 0;
	if ((s32)ctx[2]) {
		int family = ends.family;
		u64 *failed = failures.lookup(&family);

		if (failed)
			__sync_fetch_and_add(failed, segments);
		return 0;
	}
#endif
	state = READ(sk, __sk_common.skc_state);
	if (state == TCP_SYN_SENT)
		kind = KIND_SYN;
	else if (state == TCP_SYN_RECV)
		kind = KIND_SYNACK;
	else if (is_loss_probe(sk, skb))
		kind = KIND_PROBE;
	count(sk, &ends, state, kind, segments);
	return 0;
}

/* The addresses come from the request: the socket here is the listener. */
PROGRAM(tcp_retransmit_synack)
{
	struct sock *sk = (void *)ctx[0];
	struct request_sock *req = (void *)ctx[1];
	struct endpoints ends = {};

	if (!counting())
		return 0;
	read_endpoints(&ends, &req->__req_common, READ(req, __req_common.skc_num));
	count(sk, &ends, READ(req, __req_common.skc_state), KIND_SYNACK, 1);
	return 0;
}
