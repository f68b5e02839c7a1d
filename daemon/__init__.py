# SPDX-License-Identifier: Apache-2.0
"""bpfmetricsd: BPF programs that count, and the server that shows the counts to Prometheus."""

__version__ = "0.1.0"
