# SPDX-License-Identifier: Apache-2.0
"""Dashboards as code: one module each, and `parts` for what they share. `python -m grafana.build` writes the JSON."""
