# `make demo` runs the main job, `make test` the tests; each installs what it needs into .venv first.

SHELL := /bin/bash -o pipefail
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the GPU build of vLLM where an NVIDIA GPU answers, the CPU build elsewhere
ENGINE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
LOCK := requirements/$(ENGINE).txt
INSTALLED := $(VENV)/.installed-$(ENGINE)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# tests start hundreds of processes, which need not translate the same sources each time
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest
# so many at once keep two cores busy, for some of the tests wait; a process takes 1 GB, the real vLLM 3 GB
TEST_PROCESSES ?= 3
SIDE_BY_SIDE := -n $(TEST_PROCESSES) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install compile compile-if-possible demo test test-full bench-gateway bench-store bench-training bench-loadtest lint check format lock clean promtool

help:  ## these lines
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## virtual environment in .venv with everything, servers for tests included

# --no-deps: the locks are complete; the CPU one leaves out torchvision, torchaudio and torchcodec, whose registry builds
# are CUDA's and break the import of transformers beside a CPU torch.
$(INSTALLED): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@begin=$$(date +%s); \
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || exit 1; \
	torch=$$(grep '^torch==' $(LOCK)); index=; \
	if [ $(ENGINE) = cpu ] && ! $(BIN)/python -m pip install -q --dry-run --no-deps "$$torch" >/dev/null 2>&1; then index="--extra-index-url $(TORCH_CPU_INDEX)"; fi; \
	total=$$(grep -c == $(LOCK)); echo "installing $$total packages for $(ENGINE) (some minutes, once)"; \
	$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --no-deps $$index -r $(LOCK) \
	  | awk -v total=$$total '/^(Collecting|Requirement already)/ {printf "\r  %d of %d fetched", ++n, total; fflush()} /^Installing/ {printf "\n  installing them\n"; fflush()}' || exit 1; \
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . || exit 1; \
	echo $$(( $$(date +%s) - begin )) > $@

compile: $(INSTALLED)  ## the gateway's hot path, to C: a quarter less CPU a request; needs a C compiler
	$(BIN)/python -m gateway.compile

compile-if-possible: $(INSTALLED)
	@$(BIN)/python -m gateway.compile --if-possible

demo: $(INSTALLED)  ## two tenants, one base model, end to end on a real engine
	@install=0; if [ ! -e .tailor/.install-counted ] || [ $(INSTALLED) -nt .tailor/.install-counted ]; then install=$$(cat $(INSTALLED)); fi; \
	mkdir -p .tailor && touch .tailor/.install-counted; \
	TAILOR_HOME=.tailor TAILOR_DEMO_INSTALL_S=$$install $(BIN)/tailor demo

test: compile-if-possible promtool  ## all tests but the full-scale ones, three at a time; starts one real vLLM
	$(PYTEST) $(SIDE_BY_SIDE)

test-full: compile-if-possible promtool  ## the full-scale counts too: hours
	$(PYTEST) -m 'full or not full'

# nginx is the yardstick; ARGS=--quick for a look in about a minute, ARGS="--report FILE --markdown FILE" to keep the figures
bench-gateway: compile  ## what the gateway costs beside nginx: a line a figure, fails where a must is missed
	@PATH=$$PATH:/usr/sbin:/usr/local/sbin; command -v nginx >/dev/null \
	  || { command -v apt-get >/dev/null && [ $$(id -u) = 0 ] && apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends nginx-light; } \
	  || { echo "nginx is needed as the yardstick and could not be installed: install it with your system's packages, or put a build of it on PATH"; exit 1; }
	$(BIN)/python -m loadtests.overhead $(ARGS)

# ARGS=--quick for a look; ARGS="--only catalog --postgres", …
bench-store: compile-if-possible  ## what the adapter store costs, upload to first token: a line a figure, fails where a must is missed
	$(BIN)/python -m loadtests.store $(ARGS)

bench-training: $(INSTALLED)  ## what a step of training costs beside TRL's, and eight tenants at once: a line a figure
	$(BIN)/python -m loadtests.training $(ARGS)

# ARGS=--quick for a look; ARGS="--report FILE --markdown FILE" to keep the figures
bench-loadtest: $(INSTALLED)  ## what this machine's load generator can send, and how wrong its times are: a line a figure
	$(BIN)/python -m loadtests.selftest $(ARGS)

# Unpacked from the distribution's package, not installed: that would start a Prometheus server. Where the system's lists of
# packages are absent or old, lists of our own are fetched: the system's are root's.
OWN_LISTS = -o Dir::State::lists=$$PWD/lists -o Dir::Cache=$$PWD -o Debug::NoLocking=1
promtool: $(INSTALLED)  ## Prometheus' checker of alert rules, for the tests
	@if command -v promtool >/dev/null || test -x $(BIN)/promtool; then exit 0; fi; \
	command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo "promtool is needed: install Prometheus (brew install prometheus, or https://prometheus.io/download) so that promtool is on PATH"; exit 1; }; \
	rm -rf $(VENV)/promtool && mkdir -p $(VENV)/promtool && cd $(VENV)/promtool && echo "fetching promtool (20 MB, once)" && \
	{ apt-get -qq download prometheus 2>/dev/null || { mkdir -p lists/partial && apt-get -qq $(OWN_LISTS) update && apt-get -qq $(OWN_LISTS) download prometheus; }; } && \
	dpkg-deb -x prometheus_*.deb . && mv usr/bin/promtool ../bin/promtool && cd .. && rm -rf promtool

lint: $(INSTALLED)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint promtool  ## lint and the unit tests, interpreted
	TAILOR_INTERPRETED=1 $(PYTEST) $(SIDE_BY_SIDE) -q tests/unit

format: $(INSTALLED)  ## write the format and what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(INSTALLED)  ## write the lock of this engine anew from what is installed
	$(BIN)/python -m pip freeze --all --exclude-editable | grep -v '^pip==' \
	  | if [ $(ENGINE) = cpu ]; then grep -vE '^(torchvision|torchaudio|torchcodec|triton)=='; else cat; fi > $(LOCK)

clean:  ## remove environment, caches and the demo's files; a server's data in .tailor stays
	rm -rf $(VENV) .tailor/cache .tailor/demo .tailor/demo.json .tailor/.install-counted
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
