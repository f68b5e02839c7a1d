# SPDX-License-Identifier: Apache-2.0
"""Numbers as a person reads them."""

from __future__ import annotations

from daemon import words


def test_amounts_have_the_unit_that_suits_them() -> None:
    seconds = [words.amount(value, "seconds") for value in (0.0, 2.0**-20, 31e-6, 2.0**-10, 0.25, 32.0, float("inf"))]
    assert seconds == ["0 µs", "0.95 µs", "31 µs", "0.98 ms", "250 ms", "32 s", "∞"]
    sizes = [words.amount(value, "bytes") for value in (1.0, 4096.0, 131072.0, 2.0**30)]
    assert sizes == ["1 B", "4 KiB", "128 KiB", "1 GiB"]


def test_counts() -> None:
    numbers = (0, 0.04, 0.5, 7, 7.25, 9.96, 185.4, 999, 999.7, 1000, 12_350, 999_600, 1e6, 2.5e9, 3e13)
    assert [words.count(one) for one in numbers] == [
        "0", "0.04", "0.5", "7", "7.2", "10", "185", "999", "1000", "1 k", "12.3 k", "1 M", "1 M", "2.5 G", "30000 G",
    ]  # fmt: skip
    assert words.rate(12_350) == "12.3 k/s"


def test_a_share_that_is_not_all_is_not_told_as_all() -> None:
    shares = (0, 0.00001, 0.0004, 0.031, 0.5, 0.9989, 0.99951, 0.999999, 1)
    assert [words.share(one) for one in shares] == [
        "0 %", "< 0.01 %", "0.04 %", "3.1 %", "50.0 %", "99.9 %", "> 99.9 %", "> 99.9 %", "100 %",
    ]  # fmt: skip


def test_hooks_by_their_kind() -> None:
    assert words.hooks(["tp_btf:a", "tp_btf:b", "tp_btf:a", "kprobe:c"]) == "tp_btf: a b; kprobe: c"


def test_who_it_was() -> None:
    ends = (("laddr", "10.0.0.1"), ("lport", "443"), ("raddr", "10.0.0.2"), ("rport", "51234"))
    assert words.who((("pid", "7"), ("comm", "fio"), *ends)) == "fio (pid 7), 10.0.0.1:443 to 10.0.0.2:51234"
    assert words.who((("pid", "7"), ("comm", "fio"), ("cgroup", "/a"))) == "fio (pid 7), /a"
    assert words.who((("pod", "d00d"), ("container", "c0de"))) == "pod d00d"
    assert words.who(()) == "no task"
