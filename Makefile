## make demo        trains on the embedded data set (minutes) and shows what that was worth; makes .venv first
## make test        every operator, module and method, in .venv, which it makes first (ARGS="-k sinkhorn" for a part of it)
## make test-all    that and the exhaustive tests: cross products, ranks by method, broken kernels, clean builds
## make lint        ruff (errors, format), basedpyright (types), clang-format (csrc/)
## make docs        whether the pages' examples, commands, tables and links are right; the site, strictly, in build/site
## make pictures    the pictures in docs/images, anew: runs, reports and a browser (minutes; needs Chromium)
## make bench       benchmarks on this machine; results in benchmarks/results/
## make gpu-check   on a machine with a GPU and PyTorch, without network or .venv: build, canaries, GPU tests, benchmarks in
##                  under ten minutes (PART="canaries tests bench" or some of them, or dali); docs/gpu.md
## make clean       remove all that was made here, .venv too
##
## PYTHON=python3.12 chooses the Python, VENV=.venv the folder of the environment, OUT=folder where results go.

PYTHON ?= python3
VENV ?= .venv
OUT ?= benchmarks/results
ARGS =
PART ?= canaries tests bench

python := $(VENV)/bin/python
run := $(python) -m
# 5 is pytest's "no test selected", which is no failure when ARGS chooses. .ci/run insists on tests in each of the three
# processes: Triton reads its environment once, and a compile ahead of time has a stand-in for the driver.
# Two processes at a time, as most of a test's time is one thread's; waiting OpenMP threads sleep, or they would take the other's core.
pytest = OMP_WAIT_POLICY=passive $(run) pytest -n 2 --dist worksteal $(1) $(ARGS) || [ $$? -eq 5 ]

version := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Newer than the files below: the environment is as they say, for this version of Python.
ready := $(VENV)/ready-$(version)

.PHONY: help demo test test-all lint docs pictures bench gpu-check clean
help:
	@sed -n 's/^## \{0,1\}//p' Makefile

everything := -c constraints.txt -e ".[pretrain,dev]"
# When csrc/ alone changed, the extension is built again with what the environment holds: seconds, and no package index.
extension := --no-build-isolation --no-deps -e .

$(ready): pyproject.toml setup.py constraints.txt $(shell find csrc)
	@[ "$$($(python) -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>&1)" = "$(version)" ] \
	  || $(PYTHON) -m venv --clear $(VENV)
	@echo "$(if $(filter-out csrc%,$?),installing into $(VENV): minutes the first time (PyTorch),building the C++ kernels)"
	$(run) pip install -q --disable-pip-version-check $(if $(filter-out csrc%,$?),$(everything),$(extension))
	@$(python) -c 'from fastjem.kernels import _C' \
	  || { echo "the C++ kernels were not built; this says why: $(run) pip install -v $(extension)"; exit 1; }
	@touch $@

demo: $(ready)
	$(run) fastjem demo

test: $(ready)
	$(call pytest,-m "not exhaustive")
	TRITON_INTERPRET=1 $(call pytest,-m "interpreter and not exhaustive")
	$(call pytest,-m "aot and not exhaustive")

test-all: $(ready)
	$(call pytest)
	TRITON_INTERPRET=1 $(call pytest,-m interpreter)
	$(call pytest,-m aot)

lint: $(ready)
	$(run) ruff check .
	$(run) ruff format --check .
	$(VENV)/bin/basedpyright --pythonpath $(python)
	find csrc -name '*.cpp' -o -name '*.h' | xargs $(VENV)/bin/clang-format --dry-run --Werror

docs: $(ready)
	$(run) pytest -q tests/test_docs.py tests/test_site.py -m "not exhaustive" $(ARGS)
	@$(python) -c 'import material, mkdocstrings' 2> /dev/null || $(run) pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(run) mkdocs build --strict
	@echo "the site: build/site/index.html"

pictures: $(ready)
	$(python) docs/images/make.py

bench: $(ready)
	$(run) fastjem bench --out $(OUT)
	$(run) pytest benchmarks --benchmark-only --benchmark-json=$(OUT)/pytest-benchmark.json

# Bounds, in all under 10 minutes: 90 s to build, and those of tests/gpu_check.py, which also says how it ends.
gpu-check:
	$(if $(filter-out canaries tests bench dali,$(PART)),$(error PART is canaries, tests, bench or dali, got $(PART)))
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check: torch finds no GPU here")'
	timeout 90 $(PYTHON) -m pip install -q --disable-pip-version-check $(extension)
	$(PYTHON) tests/gpu_check.py $(PART) --out $(OUT) --pytest='$(ARGS)'

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .benchmarks kernels/_C*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
