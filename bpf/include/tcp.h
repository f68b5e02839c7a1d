/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/* Addresses, ports, cgroup of a socket or of a connection request (both begin with a struct sock_common). */
#ifndef BPFMETRICSD_TCP_H
#define BPFMETRICSD_TCP_H

#define AF_INET6 10
#define IPPROTO_TCP 6

enum family { FAMILY_IPV4, FAMILY_IPV6, FAMILIES };

/* IPv4 addresses lie in the first four bytes. Ports: local in the low half word, remote in the high one. */
struct endpoints {
	u64 local[2];
	u64 remote[2];
	u64 ports;
	u32 family;
};

#ifdef DIRECT_READS
#define TCP_SOCK(sk) bpf_skc_to_tcp_sock(sk)
#else
#define TCP_SOCK(sk) ((struct tcp_sock *)(sk))
#endif

static __always_inline u16 swap16(u16 port)
{
	return (u16)(port << 8 | port >> 8);
}

/* IPv4 that travels through an IPv6 socket (::ffff:a.b.c.d) is IPv4: that is what is on the wire. */
static __always_inline void read_endpoints(struct endpoints *to, struct sock_common *sk, u16 local_port)
{
	to->ports = local_port | (u32)swap16(READ(sk, skc_dport)) << 16;
	if (READ(sk, skc_family) == AF_INET6) {
		bpf_probe_read_kernel(to->local, sizeof(to->local), (void *)&sk->skc_v6_rcv_saddr);
		bpf_probe_read_kernel(to->remote, sizeof(to->remote), (void *)&sk->skc_v6_daddr);
		to->family = FAMILY_IPV6;
		if (to->remote[0] || (u32)to->remote[1] != 0xffff0000)
			return;
	}
	to->local[0] = READ(sk, skc_rcv_saddr);
	to->remote[0] = READ(sk, skc_daddr);
	to->local[1] = to->remote[1] = 0;
	to->family = FAMILY_IPV4;
}

/* The cgroup v2 that the socket belongs to; 0 where the kernel keeps it in another form. */
static __always_inline u64 socket_cgroup(struct sock *sk)
{
#ifdef HAVE_sock_cgroup_data_cgroup
	struct cgroup *cgroup = READ(sk, sk_cgrp_data.cgroup);
	struct kernfs_node *node = cgroup ? READ(cgroup, kn) : NULL;

	return node ? READ(node, id) : 0;
#else
	return 0;
#endif
}

#endif
