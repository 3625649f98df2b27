# `make` lists the targets. PYTHON=... picks the interpreter; if it has a CUDA build of torch, .venv uses that.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/ready
# Without a GPU the host build is enough, and nvcc would take minutes; LAB_CUDA=1 asks for it.
HAS_GPU = $(shell nvidia-smi -L 2>/dev/null)
# Tests run side by side where pytest-xdist is installed, but not on a GPU, which they would share.
SIDE_BY_SIDE = $(if $(HAS_GPU),,$(shell $(PY) -c 'import importlib.util as u; \
  print("-n auto --maxprocesses 4 --dist loadfile" if u.find_spec("xdist") else "")'))
MEASURED := $(or $(OUT),out/gpu-bench)

.DEFAULT_GOAL := help
.PHONY: help setup build demo lint format test test-all mutants tsan oracle gpu-check gpu-bench gpu-repeat kernels-package report clean clean-all

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Tests launch the shapes of a GPU on a CPU, too; all else does without, and builds in half the time.
test test-all mutants tsan: export LAB_HOST_GPU_SHAPES ?= 1

setup build demo test test-all oracle: export LAB_CUDA ?= $(if $(HAS_GPU),auto,0)

setup: build  ## .venv and the kernels; with a GPU, or LAB_CUDA=1, the GPU build, too
	@$(PY) -m lab doctor || true

$(READY): pyproject.toml lab/machine/setup_env.py
	@$(PYTHON) -m lab.machine.setup_env
	@touch $@

build: $(READY)
	@$(PY) setup.py --quiet build_ext --inplace
	@test .venv/bin/lab -nt pyproject.toml || $(PY) -m pip install -qq --no-deps --no-index --no-build-isolation -e .

.venv/model: $(READY)
	@$(PY) -m lab.machine.setup_env --model
	@touch $@

demo: build .venv/model  ## a real model speaks under CUDA and under Triton, compared; report in out/demo (OUT=...)
	@$(PY) -m lab.machine.demo --out $(or $(OUT),out/demo)

test: build  ## the tests (ARGS="-m quick" for those of two minutes, ARGS="-k rope" for some)
	@$(PY) -m pytest -m "not oracle and not slow" $(SIDE_BY_SIDE) $(ARGS)

test-all: build  ## all tests, as CI runs them
	@$(PY) -m pytest -m "not oracle" $(SIDE_BY_SIDE) $(ARGS)

SOURCES_C = $(shell find cuda_src hub tests -name '*.cu' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.h')

lint: $(READY)  ## what CI asks of the sources: ruff check and its format, clang-format (make format writes it)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check --quiet || { echo "not formatted: make format"; exit 1; }
	@.venv/bin/clang-format --dry-run -Werror $(SOURCES_C)

format: $(READY)  ## formats the sources
	@$(PY) -m ruff format
	@.venv/bin/clang-format -i $(SOURCES_C)

mutants: build  ## single faults planted in copies of the kernels: is each noticed? (up to 20 minutes; ARGS="--only rope")
	@$(PY) tests/mutants/run.py $(ARGS)

tsan: $(READY)  ## every CUDA kernel's host build under ThreadSanitizer, for races (ARGS="--op sample")
	@$(PY) tests/race_detector.py $(ARGS)

oracle: build .venv/model  ## the model's logits against Hugging Face transformers (installs it)
	@$(PY) -m lab.machine.setup_env --test
	@$(PY) -m pytest -m oracle $(ARGS)

gpu-check: build  ## needs a GPU: GPU tests, compute-sanitizer on every op, oracle, greedy text (OUT=... MODEL=... STEPS=...)
	@$(PY) -m lab.machine.gpu_check --out $(or $(OUT),out/gpu-check) $(MODEL:%=--model %) $(STEPS:%=--steps %)

gpu-bench: build  ## needs a GPU: ops, models, ledgers and ladders measured into OUT=... (QUICK=1; BUDGET=minutes)
	@$(PY) -m lab bench all --out $(MEASURED) --budget-minutes $(or $(BUDGET),11.5) $(if $(QUICK),--quick)
	-@$(PY) -m lab inspect --all --out $(MEASURED)
	@$(PY) -m lab report $(MEASURED)

gpu-repeat: build  ## needs a GPU: two quick runs compared; the rate of false alarms joins the last run in OUT=...
	@test -e $(MEASURED)/records.jsonl || { echo "no records to join: make gpu-bench first"; exit 2; }
	@for i in 1 2; do $(PY) -m lab bench all --quick --fresh --out out/repeat/$$i || exit 1; done
	@$(PY) -m lab compare out/repeat/1 out/repeat/2 --fail-on-slower 99% --record $(MEASURED)
	@$(PY) -m lab report $(MEASURED)

kernels-package: $(READY)  ## the Triton kernels as a folder for Hugging Face's package kernels (OUT=...)
	@$(PY) -m lab.machine.kernels_package $(OUT:%=--out %)

report:  ## draws the pages of reports/ again from their committed records
	@for run in reports/*/; do $(PY) -m lab report $$run || exit 1; done

clean:  ## removes what was built and what was written to out/
	rm -rf build out lab/*.so .pytest_cache

clean-all: clean  ## removes .venv, too
	rm -rf .venv
