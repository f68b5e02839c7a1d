# SPDX-License-Identifier: Apache-2.0
"""cachestat against arithmetic and the kernel's own counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import os
import pytest

from tests.kernel.files import PAGE, TRACING, Counts, Disk, File, Meter, disk, mkfs, witness
