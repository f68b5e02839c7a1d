# SPDX-License-Identifier: Apache-2.0
"""What all levels share: a test that needs what this machine lacks says so, and in CI that is a failure."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NoReturn

import pytest

REQUIRE = "BPFMETRICSD_REQUIRE"
Lacks = Callable[[str], NoReturn]


@pytest.fixture(scope="session")
def lacks() -> Lacks:
    """Call it with what the machine lacks and what to install: skips, or fails where everything should be there."""

    def say(what: str) -> NoReturn:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{what} ({REQUIRE}=1 makes this a failure)")
        pytest.skip(what)

    return say
