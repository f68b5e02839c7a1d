# SPDX-License-Identifier: Apache-2.0
"""The web configuration file, and what it does over real sockets."""

from __future__ import annotations

import asyncio
import base64
import http.client
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemon import server, webconfig
from daemon.errors import UnsupportedError, UsageError
from tests_server import FakeSource
