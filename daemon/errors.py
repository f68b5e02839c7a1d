# SPDX-License-Identifier: Apache-2.0
"""Errors that a person reads: one line each, the object, the cause, the remedy."""

from __future__ import annotations


class BpfmetricsdError(Exception):
    """Something failed at run time. `status` is the exit status of the command."""

    status = 1


class UsageError(BpfmetricsdError):
    """Wrong usage or configuration. `problems` holds one line for each fault found."""

    status = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class UnsupportedError(BpfmetricsdError):
    """This kernel, or these privileges, do not allow it."""

    status = 3
