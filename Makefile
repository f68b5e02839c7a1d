# SPDX-License-Identifier: Apache-2.0
.PHONY: setup run test lint deb dashboards help
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python

help: ## say what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: ## install what is missing to run (Debian packages, .venv), mount bpffs and tracefs
	@packaging/bootstrap run

run: setup ## load the collectors and serve http://127.0.0.1:10435/metrics
	@exec .venv/bin/bpfmetricsd run

test: ## run the tests (installs what is missing)
	@packaging/bootstrap test
	$(PYTHON) -m pytest -m 'not vm'

lint: ## ruff, mypy, shell and YAML checks
	@packaging/bootstrap test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	shellcheck packaging/bootstrap .ci/run packaging/build-deb packaging/completion/bpfmetricsd \
		packaging/debian/bpfmetricsd.postinst packaging/debian/bpfmetricsd.prerm packaging/debian/bpfmetricsd.postrm
	$(PYTHON) -m yamllint -c config/yamllint.yaml config grafana/provisioning packaging/k8s

deb: ## build the Debian package into dist/
	@packaging/bootstrap test
	@packaging/build-deb

dashboards: ## write grafana/dashboards from the Python that builds them
	@packaging/bootstrap test
	$(PYTHON) -m grafana.build
