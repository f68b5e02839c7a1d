# SPDX-License-Identifier: Apache-2.0
"""`python3 -m daemon` is `bpfmetricsd`."""

from __future__ import annotations

import sys

from daemon.cli import main

sys.exit(main())
