# Everything a checkout needs: `make demo` to see it work, `make test` and `make check` before a change.
# Needs Python 3.11-3.13, git, make and a package index; no compiler. PYTHON=... chooses the interpreter.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Containers often set it; every process would compile a thousand modules that the one before it compiled.
unexport PYTHONDONTWRITEBYTECODE

SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first that runs: a version manager may put names on PATH that do not.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	$$python -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$python && break; done)

VENV := .venv
BIN := $(VENV)/bin
# Wheels only, each with its hash; modules are compiled when first imported, which saves half the time.
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-compile
# The lock is complete, so nothing is resolved again: pip would ask for a hash of what it did not pick.
FROM_LOCK := --no-deps --only-binary :all: --require-hashes
LOCKED := $(INSTALL) $(FROM_LOCK)

# EXTRAS="cuda docker hub kubernetes mlflow mirror", or some of them; kept until others are given.
KEPT_EXTRAS := $(shell cat $(VENV)/extras 2>/dev/null)
EXTRAS ?= $(KEPT_EXTRAS)
LOCKS := $(patsubst %,requirements/%.lock,$(if $(filter cuda,$(EXTRAS)),,run) $(EXTRAS))
ifneq ($(strip $(EXTRAS)),$(strip $(KEPT_EXTRAS)))
.PHONY: $(VENV)/run.stamp
endif
TOOLS := build/release-tools

.PHONY: help install demo test test-all test-kernels check format rooms bench bench-learning production-test soak reliability release pinned-images audit-pins docs pictures example-model real-model real-test real-test-llama llama-server lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

# Compiled here, for a service's user who may not write here. A package may hold modules for a newer Python,
# which do not compile: pip passes over those too.
install: $(VENV)/project.stamp ## the command nested-tune in .venv/bin
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	$(BIN)/python -m compileall -q -j 0 nested_core tasks flows

demo: $(VENV)/project.stamp ## validate, train, judge and promote a tiny adapter
	$(BIN)/nested-tune demo

# A worker that has nothing left to do takes tests from one that has.
PYTEST := $(BIN)/pytest -n auto --dist worksteal
FAST := "not slow and not reliability and not production and not real"
test: $(VENV)/dev.stamp ## the tests to run between two edits
	$(PYTEST) -m $(FAST)

test-all: test ## make test, and the slow tests that it leaves out
	$(PYTEST) -m "slow and not reliability and not production"

# Each setting of the environment has its own log: NAME.log.
test-kernels: $(VENV)/dev.stamp ## make test under OpenBLAS's kernels for other processors, and without OpenBLAS; logs in build/test-kernels
	@mkdir -p build/test-kernels; failed=0; \
	for name in Haswell Zen SkylakeX own-kernels no-openblas; do \
		case $$name in \
			own-kernels) setting="-u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE";; \
			no-openblas) setting="NESTED_TUNE_NO_OPENBLAS=1";; \
			*) setting="OPENBLAS_CORETYPE=$$name";; \
		esac; \
		if [ $$name = SkylakeX ] && ! grep -qsw avx512f /proc/cpuinfo; then \
			echo "$$name: not run, for this processor has no AVX-512"; continue; \
		fi; \
		if env $$setting $(PYTEST) -m $(FAST) >build/test-kernels/$$name.log 2>&1; then end=passed; else end=FAILED failed=1; fi; \
		echo "$$name: $$end, build/test-kernels/$$name.log"; \
	done; exit $$failed

check: $(VENV)/dev.stamp ## format, lint and complexity, types, import directions, documents, budgets of lines
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m docs.make_python --check
	$(BIN)/python -m docs.make_command_line --check
	$(BIN)/python -m docs.make_environment --check
	$(BIN)/python -m docs.make_silent_failures --check
	$(BIN)/python docs/check_prose.py --check
	$(BIN)/python docs/check_budgets.py
	$(BIN)/python docs/build_site.py

format: $(VENV)/dev.stamp ## format, and repair what lint can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

rooms: $(VENV)/dev.stamp ## each room deleted in a copy: what is left works; minutes a room, or ROOMS="--all", ROOMS="serve"
	$(BIN)/python -m tests.without_rooms $(ROOMS)

bench: $(VENV)/project.stamp ## side-by-side measurements, each printing a ratio
	$(BIN)/python -m benchmarks

LEARNING := $(BIN)/python -m benchmarks.learning --study small
LEARNING_ROWS := benchmarks/results/learning.jsonl
bench-learning: $(VENV)/project.stamp ## what adapters learn, small and resumable; DATA=folder adds a task of real text
	$(LEARNING) run $(LEARNING_ROWS) --bases examples --workers 2 $(if $(DATA),--data "$(DATA)")
	$(LEARNING) report $(LEARNING_ROWS) --out benchmarks/results/learning

production-test: $(VENV)/dev.stamp ## PostgreSQL, a server with auth, workers, and what runs on them; takes minutes
	$(BIN)/pytest -m "production and not soak"

RUNS ?= 500
soak: $(VENV)/dev.stamp ## RUNS=500 tiny trainings through the queue, with two workers; takes most of an hour
	SOAK_RUNS=$(RUNS) $(BIN)/pytest -m soak -s

reliability: $(VENV)/dev.stamp ## crashes, hostile files and races; takes minutes
	$(PYTEST) -m reliability

docs: $(VENV)/dev.stamp ## write the pages that are made from the code again, and build the site
	$(BIN)/python -m docs.make_configuration
	$(BIN)/python -m docs.make_python
	$(BIN)/python -m docs.make_command_line
	$(BIN)/python -m docs.make_environment
	$(BIN)/python -m docs.make_silent_failures
	$(BIN)/python -m docs.make_support
	$(BIN)/python docs/build_site.py
	@echo "Written: build/docs/site/index.html"

pictures: $(VENV)/project.stamp ## draw the pictures of the documents again, from runs that it makes
	$(BIN)/python docs/make_pictures.py

example-model: $(VENV)/project.stamp ## remake the tiny base model in examples/
	$(BIN)/python examples/make_model.py

real-model: $(VENV)/project.stamp ## SmolLM2-135M-Instruct from the package index (98 MB) in build/
	$(BIN)/python -m benchmarks.real_model.make_model build/SmolLM2-135M-Instruct

real-test: real-model $(VENV)/dev.stamp ## what README claims, on that model: a quarter of an hour on two cores
	$(BIN)/pytest -n0 -m real tests/real

LLAMA_CPP := build/llama-cpp-python
LLAMA_SERVER := build/llama-server
real-test-llama: real-model $(LLAMA_CPP)/stamp $(LLAMA_SERVER)/bin/llama-server $(VENV)/dev.stamp ## the same, with llama.cpp as a second reader; compiles it: cmake, g++
	PYTHONPATH=$(LLAMA_CPP) $(BIN)/pytest -n0 -m real tests/rooms/export/test_llama_cpp.py tests/real/test_first_adapter.py
	PYTHONPATH=$(LLAMA_CPP) PATH="$(CURDIR)/$(LLAMA_SERVER)/bin:$$PATH" $(BIN)/pytest -n0 tests/rooms/export/test_served.py

$(LLAMA_CPP)/stamp: $(VENV)/project.stamp requirements/llama-cpp.lock
	@echo "Making $(LLAMA_CPP): llama.cpp is compiled, which takes ten minutes or more on two cores."
	$(INSTALL) --no-deps --require-hashes --upgrade --target $(LLAMA_CPP) -r requirements/llama-cpp.lock
	@touch $@

# Of the same sources, which the package does not build.
llama-server: $(LLAMA_SERVER)/bin/llama-server ## llama.cpp's server in build/, which export asks; compiles it: cmake, g++
$(LLAMA_SERVER)/bin/llama-server: $(VENV)/project.stamp requirements/llama-cpp.lock
	$(PIP) download --quiet --no-deps --no-binary llama-cpp-python --require-hashes -d $(LLAMA_SERVER) -r requirements/llama-cpp.lock
	tar -xzf $(LLAMA_SERVER)/llama_cpp_python-*.tar.gz -C $(LLAMA_SERVER) --strip-components 1
	cmake -S $(LLAMA_SERVER)/vendor/llama.cpp -B $(LLAMA_SERVER) -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF
	cmake --build $(LLAMA_SERVER) --target llama-server

COMPILE := $(TOOLS)/bin/uv pip compile --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --custom-compile-command "make lock" --quiet $(UPGRADE)
lock: $(TOOLS)/stamp ## pin the dependencies again; UPGRADE=--upgrade takes the newest
	$(COMPILE) pyproject.toml --extra cpu --group build -o requirements/run.lock
	$(COMPILE) pyproject.toml --extra cpu --group dev -c requirements/run.lock -o requirements/dev.lock
	for extra in cuda docker hub kubernetes mlflow mirror; do $(COMPILE) pyproject.toml --extra $$extra --group build \
		-c requirements/run.lock -o requirements/$$extra.lock || exit; done
	$(COMPILE) --group release -o requirements/release.lock

release: pinned-images $(TOOLS)/stamp $(VENV)/project.stamp ## the wheel, its bill of materials and all licences, in build/release
	$(TOOLS)/bin/python -m build --wheel --outdir build/release
	$(TOOLS)/bin/cyclonedx-py requirements --output-reproducible -o build/release/sbom.cdx.json requirements/run.lock
	$(TOOLS)/bin/pip-licenses --python $(BIN)/python --from mixed --format plain-vertical \
		--with-license-file --no-license-path --output-file build/release/licences.txt

pinned-images:
	@! grep -n "image:" deployments/*/compose.yaml | grep -v "@sha256:" || { \
		echo "Name each of these images by its digest first: IMAGE@sha256:..." >&2; exit 1; }

audit-pins: $(TOOLS)/stamp ## ask an advisory service of the network for known weaknesses of what is pinned
	for lock in run cuda docker hub kubernetes mlflow mirror; do $(TOOLS)/bin/pip-audit --require-hashes --disable-pip -r requirements/$$lock.lock || exit; done

$(TOOLS)/stamp: requirements/release.lock
	$(PYTHON) -m venv --clear $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install --quiet $(FROM_LOCK) -r $<
	@touch $@

clean: ## remove the environment and what the tools left
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A new lock makes a new environment; a new pyproject.toml only installs the project again.
$(VENV)/run.stamp: $(LOCKS)
	@if [ -z "$(PYTHON)" ]; then \
		echo "nested-tune needs Python 3.11, 3.12 or 3.13 with its venv module; found on PATH:" \
			"$$(python3 --version 2>/dev/null || echo no python3)." >&2; \
		echo "Install one (on Debian and Ubuntu python3-venv too)," \
			"or say where it is: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; fi
	@$(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13 with its venv module." >&2; exit 1; }
	@echo "Making $(VENV) with the locked dependencies: half a minute or more, 600 MB."
	$(PYTHON) -m venv --clear $(VENV)
	@echo "$(EXTRAS)" >$(VENV)/extras
	$(LOCKED) $(addprefix -r ,$(LOCKS))
	@touch $@

$(VENV)/project.stamp: $(VENV)/run.stamp pyproject.toml
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/project.stamp requirements/dev.lock
	$(LOCKED) -r requirements/dev.lock
	@touch $@
