# Each target does its own set-up, from nothing but Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# An old generator, so that the SDK runs beside old versions of grpcio and protobuf.
GENERATOR := .venv-protos
GENERATOR_READY := $(GENERATOR)/.ready
# Tools for releases, apart from what they look at.
RELEASE := .venv-release
RELEASE_READY := $(RELEASE)/.ready

# Test files that run beside each other, each with one compute thread.
JOBS ?= 2

export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo serve test check format generate polyglot peers faults fuzz evict soak bench lock audit sbom clean
.PHONY: monitoring pictures kubernetes
.PHONY: envoy image torchvision

help: ## say what the targets are
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## start a daemon, load the demo model, make pictures of all three tasks in out/
	$(BIN)/python -m denoised_server.demo --out out

serve: $(READY) ## run a daemon in this terminal
	$(BIN)/denoised serve

test: $(READY) ## run the tests
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

check: $(READY) $(GENERATOR_READY) ## lint, types, import rules, protos, generated code fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy protos/generate.py protos/breaking.py protos/document.py client/unasync.py deploy tests
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint
	$(BIN)/python protos/breaking.py
	$(BIN)/python protos/document.py --check
	$(BIN)/python deploy/monitoring/reference.py --check
	$(BIN)/python deploy/monitoring/dashboard.py --check
	$(BIN)/python deploy/helm/reference.py --check
	PATH=$(abspath $(GENERATOR))/bin:$$PATH $(GENERATOR)/bin/python protos/generate.py --check
	$(BIN)/python client/unasync.py --check

format: $(READY) ## put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

generate: $(READY) $(GENERATOR_READY) ## write what is generated: client/denoised/v1, docs/api.md, the sync SDK
	PATH=$(abspath $(GENERATOR))/bin:$$PATH $(GENERATOR)/bin/python protos/generate.py
	$(BIN)/python protos/document.py
	$(BIN)/python deploy/monitoring/reference.py
	$(BIN)/python deploy/monitoring/dashboard.py
	$(BIN)/python deploy/helm/reference.py
	$(BIN)/python client/unasync.py

polyglot: $(READY) ## build the clients in Go, TypeScript and C++, and run them against a live daemon
	deploy/tools.sh polyglot
	$(BIN)/python -m pytest -m tools tests/polyglot

torchvision: $(READY) ## run the parity suite's families that need torchvision
	deploy/tools.sh torchvision
	PYTHONPATH=$(abspath tests/torchvision):$(abspath .tools/torchvision) $(BIN)/python -m pytest -m package tests/parity

peers: $(READY) ## install the servers that `make bench` compares with, each for itself
	$(BIN)/python -m tests.benchmarks.peers

monitoring: $(READY) ## run a Prometheus against a live daemon: the dashboard, the rules and the alerts
	deploy/tools.sh monitoring
	$(BIN)/python -m pytest -m tools tests/monitoring

pictures: $(READY) ## draw docs/overview.svg, dashboard.svg and top.svg, of a daemon at work, with a real Prometheus
	deploy/tools.sh monitoring
	PATH=$(abspath .tools)/bin:$$PATH $(BIN)/python -m tests.monitoring.pictures

kubernetes: $(READY) ## check the Helm chart with helm, strict schemas, promtool, and a daemon
	deploy/tools.sh kubernetes monitoring
	$(BIN)/python -m pytest -m tools tests/kubernetes

envoy: $(READY) ## run the Envoy example before two live daemons
	deploy/tools.sh envoy
	$(BIN)/python -m pytest -m tools tests/envoy

image: $(READY) ## build the image for the CPU without a container daemon, and run it; needs root
	deploy/tools.sh image
	$(BIN)/python -m pytest -m tools tests/containers

evict: $(READY) ## run the parity suite while every component leaves the device between its calls
	DENOISED_EVICT=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile tests/parity

fuzz: $(READY) ## the fuzzing's long mode; prints what was sent and how it was answered
	DENOISED_FUZZ=long $(BIN)/python -m pytest --timeout 3600 tests/fuzz
	cat out/fuzz.txt

faults: $(READY) ## hurt daemons for some ten minutes; prints the tables of docs/reliability.md
	DENOISED_FAULTS=long $(BIN)/python -m pytest -s -n 0 --timeout 1800 tests/faults

soak: $(READY) ## load a daemon for half an hour while workers and clients are killed; prints what is left
	$(BIN)/python -m tests.soak --minutes 30

bench: $(READY) ## run the benchmarks; they print ratios
	$(BIN)/python -m tests.benchmarks

lock: $(RELEASE_READY) ## write deploy/requirements.lock: what images install, with hashes
	$(RELEASE)/bin/python deploy/lock.py

audit: $(RELEASE_READY) ## ask the advisory database about everything in the lock; a release needs it to be clean
	$(RELEASE)/bin/pip-audit --disable-pip --require-hashes --strict -r deploy/requirements.lock

sbom: $(RELEASE_READY) ## write out/sbom.json, a CycloneDX bill of what is in the lock
	mkdir -p out
	$(RELEASE)/bin/cyclonedx-py requirements deploy/requirements.lock -o out/sbom.json

clean: ## remove what the other targets made
	rm -rf $(VENV) $(GENERATOR) $(RELEASE) .venv-peers .tools client/go/build client/cpp/build client/typescript/build \
		client/typescript/node_modules out dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml deploy/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint deploy/constraints.txt --editable '.[dev]'
	touch $@

$(GENERATOR_READY): Makefile
	$(PYTHON) -m venv $(GENERATOR)
	$(GENERATOR)/bin/pip install --quiet grpcio-tools==1.71.2 mypy-protobuf==3.6.0 'protobuf<6' 'setuptools<81'
	touch $@

$(RELEASE_READY): Makefile
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/pip install --quiet 'uv>=0.9' 'pip-audit>=2.9' 'cyclonedx-bom>=7'
	touch $@
