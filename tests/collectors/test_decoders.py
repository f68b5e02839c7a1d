# SPDX-License-Identifier: Apache-2.0
"""Exemplar labels: what is kept when there is too much."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectors.decoders import exemplar, fit, place
from daemon.declare import Context
from daemon.model import EXEMPLAR_LABELS_MAX

UID = "1b2c3d4e-0123-4567-89ab-0123456789ab"
SLICE = "/kubepods.slice/kubepods-pod1b2c3d4e_0123_4567_89ab_0123456789ab.slice"
IN_POD = f"{SLICE}/cri-containerd-{'c0ffee12' * 8}.scope"
CONTAINER, POD = ("container", "c0ffee12c0ff"), ("pod", UID)
SERVICE = "/system.slice/db.service"
CONTEXT = Context(options={}, max_series=10, created=5.0, cgroup_path=lambda _: IN_POD, wall_clock=lambda _: 1.0)
TASK = (("pid", "1234567"), ("comm", "postgres"))
IPV4 = (("laddr", "192.168.100.101"), ("lport", "32768"), ("raddr", "192.168.100.102"), ("rport", "65535"))


def raw(cgroup: int) -> dict[str, Any]:
    comm = [int.from_bytes(b"postgres", "little"), 0]
    return {"pid": 1234567, "comm": comm, "cgroup": cgroup, "words": [0], "value": 1, "time_ns": 1}


@pytest.mark.parametrize(
    ("path", "expected"),
    [(SERVICE, (("cgroup", SERVICE),)), (IN_POD, (CONTAINER, POD)), (SLICE, (POD,)), ("", (("cgroup", ""),))],
)
def test_a_pod_takes_the_place_of_the_path(path: str, expected: tuple[tuple[str, str], ...]) -> None:
    assert place(path) == expected


@pytest.mark.parametrize(
    ("path", "expected"), [(IN_POD, (CONTAINER, POD)), (SERVICE, (("cgroup", SERVICE),)), ("", ())]
)
def test_exemplar_names_task_and_place(path: str, expected: tuple[tuple[str, str], ...]) -> None:
    found = exemplar(raw(3), 1, replace(CONTEXT, cgroup_path=lambda _: path))
    assert found
    assert found.labels == (*TASK, *expected)


def test_without_a_cgroup_there_is_no_place() -> None:
    found = exemplar(raw(0), 1, CONTEXT)
    assert found
    assert found.labels == TASK


def test_with_the_ends_of_a_connection_a_pod_loses_the_tail_of_its_id() -> None:
    assert fit((*TASK, *IPV4, CONTAINER, POD)) == (*TASK, *IPV4, CONTAINER, ("pod", "1b2c3d4e-0123-4567-89…"))


def test_with_no_room_for_eight_digits_there_is_no_pod() -> None:
    task = (("pid", "1234567"), ("comm", "a" * 15))
    rest = EXEMPLAR_LABELS_MAX - sum(len(name) + len(value) for name, value in (*task, *IPV4, CONTAINER))
    filler = ("x", "y" * (rest - len("pod") - 8 - 1))
    assert fit((*task, *IPV4, CONTAINER, filler, POD))[-1] == filler
    assert fit((*task, *IPV4, CONTAINER, ("x", filler[1][1:]), POD))[-1] == ("pod", "1b2c3d4e…")


def test_a_long_path_loses_its_head() -> None:
    path = "/" + "/".join(f"level{number}" for number in range(30))
    (kept,) = fit([("cgroup", path)])
    assert kept[1] == "…" + path[-(EXEMPLAR_LABELS_MAX - len("cgroup") - 1) :]


LABELS = st.lists(
    st.tuples(st.sampled_from(["pid", "comm", "cgroup", "container", "pod", "laddr"]), st.text(max_size=150)),
    max_size=8, unique_by=lambda label: label[0],
)  # fmt: skip


@given(LABELS)
def test_no_labels_pass_the_limit_and_none_is_empty(labels: list[tuple[str, str]]) -> None:
    kept = fit(labels)
    assert sum(len(name) + len(value) for name, value in kept) <= EXEMPLAR_LABELS_MAX
    assert all(value for _, value in kept)
    given_values = dict(labels)
    for name, value in kept:
        whole = given_values[name]
        assert value == whole or (name == "cgroup" and whole.endswith(value[1:])) or whole.startswith(value[:-1])


@given(LABELS.filter(lambda labels: sum(len(name) + len(value) for name, value in labels) <= EXEMPLAR_LABELS_MAX))
def test_what_fits_stays_as_it_is(labels: list[tuple[str, str]]) -> None:
    assert fit(labels) == tuple(label for label in labels if label[1])
