# SPDX-License-Identifier: Apache-2.0
"""Dashboards as code: one module a dashboard, `parts` for what they share. `python -m grafana.build` writes the JSON."""
