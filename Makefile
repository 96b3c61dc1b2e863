# From a fresh machine in two commands: `make demo` and `make test`. Each creates the virtual environment,
# installs torch and rnnkit and builds the kernels where that is not done yet, then does its job. Only `make gpu`
# takes Python as it is, and so needs no network.

PYTHON ?= python3
TORCH ?=
VENV ?= .venv
ARGS ?=
OUT ?= build/gpu
N ?= 10000
MALFORMED ?= 2000
SEED ?= 0
SANITIZE_TESTS ?= test_kernels.py test_registered.py test_freezing.py test_direct.py -k '(not test_against_reference or float32) and not other_cpu_capabilities'

# Where no GPU can run them, CUDA kernels are compiled only if asked for: it takes minutes.
RNNKIT_CUDA ?= $(if $(shell command -v nvidia-smi),,0)
export RNNKIT_CUDA

switches := cpu=$(RNNKIT_CPU) cuda=$(RNNKIT_CUDA) $(TORCH_CUDA_ARCH_LIST)

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
compiler := $${CXX:-c++}

# What an extra of pyproject.toml names, without rnnkit, which stays as it is.
install_extra = $(python) -c 'import importlib.metadata as m; \
	print(*(r.partition(";")[0] for r in m.requires("rnnkit") if "extra == \"$(1)\"" in r), sep="\n")' \
	> $(VENV)/$(1).txt && $(pip) install --requirement $(VENV)/$(1).txt
csrc := $(shell find csrc -type f)
formatted := $(filter %.h %.cpp %.cu %.cuh,$(csrc))

# A test that fails is not hidden by the log that it is piped into.
SHELL := bash
.SHELLFLAGS := -o pipefail -c

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test fuzz fuzz-sanitize bench bench-quick bench-report lint format sanitize sanitize-build clean FORCE
.PHONY: gpu gpu-build gpu-test gpu-sanitize gpu-bench

help:
	@echo 'make demo       train a character model with torch.nn and rnnkit side by side'
	@echo 'make test       run the test suite'
	@echo 'make bench      measure rnnkit beside torch.nn, JAX, ONNX Runtime and OpenVINO: 25 minutes'
	@echo '                make bench-quick: a part, under 2; make bench-report: README and docs of the newest results'
	@echo "                ARGS='--isa avx2' holds all of them to an older CPU's instructions"
	@echo 'make lint       ruff, mypy and clang-format; make format mends what they can mend'
	@echo 'make sanitize   run the kernels under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make fuzz       N=10000 random configurations beside torch.nn and MALFORMED=2000 random malformed calls, of SEED=0'
	@echo '                make fuzz-sanitize: malformed calls under AddressSanitizer and UndefinedBehaviorSanitizer'
	@echo 'make gpu        on a machine with a GPU, nvcc and a $(PYTHON) that has torch, pytest, setuptools and numpy:'
	@echo '                gpu-build, gpu-test, gpu-sanitize (compute-sanitizer) and gpu-bench; logs in $(OUT)'
	@echo 'make clean      remove what was built; $(VENV) stays'
	@echo
	@echo "ARGS='...'           arguments of the example, of pytest or of the benchmarks, as in make test ARGS='-k lstm'"
	@echo 'TORCH=torch==2.13.0  the torch to install; by default the newest, without a GPU a CPU build where the index has one'
	@echo 'PYTHON=python3.12    the Python that $(VENV) is made with, now $(PYTHON)'
	@echo 'RNNKIT_CPU=0         do without the C++ extension'
	@echo 'RNNKIT_CUDA=0        do without the CUDA library, by default where there is no GPU; 1 builds it in any case'

demo: $(VENV)/built
	@$(python) examples/char_rnn.py $(ARGS)

test: $(VENV)/built $(VENV)/testers
	@$(python) -m pytest $(ARGS)

# What tests/fuzz.py prints of a failure is run again with $(python) in the place of python.
fuzz: $(VENV)/built $(VENV)/testers
	@$(python) tests/fuzz.py $(N) --malformed $(MALFORMED) --seed $(SEED) $(ARGS)

bench: $(VENV)/built $(VENV)/peers
	@$(python) -m benchmarks $(ARGS)

bench-quick: $(VENV)/built $(VENV)/peers
	@$(python) -m benchmarks --quick $(ARGS)

bench-report: $(VENV)/built $(VENV)/peers
	@$(python) -m benchmarks.report $(ARGS)

lint: $(VENV)/linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(formatted)

format: $(VENV)/linters
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(formatted)

# A second build of the package, run from its own folder so that it is the one imported. Stderr is not
# captured, since a report ends the process; leaks are not looked for, since Python frees little at exit, and
# more memory than there is is an error of the caller's.
# There is no ThreadSanitizer run: gcc's OpenMP runtime is not instrumented, so that each of its barriers,
# and with it every parallel region, is reported as a race.
in_sanitized = cd build/sanitize && \
	export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=. && \
	export LD_PRELOAD=$$($(compiler) -print-file-name=libasan.so):$$($(compiler) -print-file-name=libstdc++.so) && \
	$(abspath $(python))

sanitize-build: $(VENV)/testers
	RNNKIT_CPU=1 RNNKIT_SANITIZE=address,undefined \
		$(python) setup.py --quiet build --build-lib build/sanitize
	$(in_sanitized) -c 'from rnnkit import _C; assert "/sanitize/" in _C.__file__, _C'

sanitize: sanitize-build
	$(in_sanitized) -m pytest --capture=sys --config-file=$(CURDIR)/pyproject.toml \
		--rootdir=$(CURDIR) $(patsubst test_%.py,$(CURDIR)/tests/test_%.py,$(SANITIZE_TESTS)) $(ARGS)

fuzz-sanitize: sanitize-build
	$(in_sanitized) $(CURDIR)/tests/fuzz.py --malformed $(MALFORMED) --seed $(SEED) $(ARGS)

# `make --keep-going gpu` goes on after a part that failed.
gpu: gpu-build gpu-test gpu-sanitize gpu-bench

$(OUT):
	@mkdir -p $@

gpu-build: | $(OUT)
	RNNKIT_CUDA=1 $(PYTHON) setup.py build_ext --inplace 2>&1 | tee $(OUT)/build.log
	$(PYTHON) -m rnnkit info 2>&1 | tee $(OUT)/info.log

gpu-test: | $(OUT)
	$(PYTHON) -m pytest -m gpu $(ARGS) 2>&1 | tee $(OUT)/test.log

# Each tensor is memory of its own, so that memcheck sees what is read or written beside it.
gpu-sanitize: | $(OUT)
	@export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTEST_TIMEOUT=0 PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin"; status=0; \
	for tool in memcheck racecheck; do \
		echo "compute-sanitizer --tool $$tool"; \
		compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(PYTHON) -m pytest -m gpu -k sanitize $(ARGS) 2>&1 | tee $(OUT)/$$tool.log || status=1; \
	done; exit $$status

gpu-bench: | $(OUT)
	$(PYTHON) -m benchmarks.gpu $(ARGS) 2>&1 | tee $(OUT)/bench.log

clean:
	rm -rf build dist rnnkit.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f rnnkit/_C.*.so rnnkit/_cuda.so rnnkit/_build.py $(addprefix $(VENV)/,installed testers linters peers built)

$(python):
	$(PYTHON) -m venv $(VENV)

# What TORCH is where it is not given. A build for CUDA would be gigabytes that no GPU uses.
$(VENV)/default-torch: | $(python)
	@cpu=; command -v nvidia-smi >/dev/null || \
		cpu=$$($(python) -m pip index versions torch 2>/dev/null | grep -o '[0-9.]*+cpu' | sort --version-sort | tail -n 1); \
	printf '%s\n' 2.10 "$$cpu" | sort --version-sort --check=quiet || cpu=; \
	echo "torch$${cpu:+==}$${cpu:->=2.10}" > $@

# Written anew only when TORCH is another one, so that what is installed follows it.
$(VENV)/torch: FORCE | $(python) $(if $(TORCH),,$(VENV)/default-torch)
	@torch='$(TORCH)'; echo "$${torch:-$$(cat $(VENV)/default-torch)}" | cmp --silent - $@ || \
		echo "$${torch:-$$(cat $(VENV)/default-torch)}" > $@

# Likewise for the switches.
$(VENV)/switch: FORCE | $(python)
	@echo '$(switches)' | cmp --silent - $@ || echo '$(switches)' > $@

# Compiles nothing: that is the turn of `built`, whose progress can be seen.
$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py build_cuda.py build_objects.py
	@echo "Installing $$(cat $<), rnnkit and what its examples need into $(VENV): about half a minute, more for CUDA's torch."
	@$(pip) install "$$(cat $<)" 'setuptools>=77'
	@RNNKIT_CPU=0 RNNKIT_CUDA=0 $(pip) install --no-build-isolation --editable '.[examples]'
	@touch $@

$(VENV)/testers: $(VENV)/installed
	@$(call install_extra,test)
	@touch $@

$(VENV)/linters: $(VENV)/installed
	@$(call install_extra,dev)
	@touch $@

$(VENV)/peers: $(VENV)/installed
	@$(call install_extra,bench)
	@touch $@

# Only what changed is compiled.
$(VENV)/built: $(VENV)/installed $(VENV)/switch $(csrc)
	@echo 'Compiling what changed of the kernels: about a minute and a half if it is all of them.'
	@$(python) setup.py --quiet build_ext --inplace
	@touch $@
