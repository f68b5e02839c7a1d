# SPDX-License-Identifier: Apache-2.0
.PHONY: setup run test test-vm accuracy lint deb screenshot dashboards help
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

test-vm: ## run the tests on other kernels and other Debians (QEMU, systemd-nspawn; about half an hour)
	@packaging/bootstrap vm
	$(PYTHON) -m pytest -m vm

accuracy: ## compare with the kernel's own counts, here and in the guests, and write docs/accuracy.md
	@packaging/bootstrap vm
	rm -rf dist/accuracy
	BPFMETRICSD_ACCURACY=$(CURDIR)/dist/accuracy $(PYTHON) -m pytest -m kernel tests/kernel
	BPFMETRICSD_ACCURACY=$(CURDIR)/dist/accuracy $(PYTHON) -m pytest -m vm tests/vm/test_kernels.py
	$(PYTHON) -m tests.accuracy dist/accuracy/*.json

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

screenshot: ## take the picture of the page that the README shows (real load for two minutes)
	@packaging/bootstrap test
	BPFMETRICSD_UPDATE_GOLDEN=1 $(PYTHON) -m pytest tests/kernel/test_page.py -k which_resource

dashboards: ## write grafana/dashboards from the Python that builds them
	@packaging/bootstrap test
	$(PYTHON) -m grafana.build
