# Two commands set hasten up on a fresh Debian machine with Python 3.11 and g++: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The instruction-set levels that this CPU runs; a wheel (`pip wheel .`) holds all of them.
LEVELS := scalar$(if $(shell grep -m1 -ow avx2 /proc/cpuinfo),;avx2)$(if $(shell grep -m1 -ow avx512_vnni /proc/cpuinfo),;avx512)

.PHONY: demo test lint docs native levels sanitize soak-engine clean peers

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins every dependency; torch comes as the CPU wheel.
$(STAMP): pyproject.toml constraints.txt native/CMakeLists.txt $(shell find native src -name '*.cpp' -o -name '*.h' -o -name '*.py' -o -name '*.toml' -o -name '*.html' 2>/dev/null) | $(BIN)/python
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "hasten needs a C++20 compiler: apt-get install g++" >&2; exit 1; }
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -C "cmake.define.HASTEN_LEVELS=$(LEVELS)" ".[test,lint,docs,retrieval]"
	touch $@

demo: $(STAMP)
	$(BIN)/hasten demo

test: demo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

# For development: build the native modules in place, beside the Python sources.
native:
	cmake -S native -B build/native -DPython_EXECUTABLE=$(shell command -v $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)))
	cmake --build build/native --parallel
	cmake --install build/native --prefix src

# Compiles the levels that this CPU does not run, which `make demo` leaves out.
OTHER_LEVELS := $(filter-out $(subst ;, ,$(LEVELS)),avx2 avx512)
levels: $(STAMP)
	$(if $(OTHER_LEVELS),$(BIN)/python -m pip wheel . --no-deps -w build/levels -C "cmake.define.HASTEN_LEVELS=$(subst $() $(),;,$(OTHER_LEVELS))")

# The tests that work natively, on modules built with the address and undefined-behaviour sanitizers, for the instruction
# sets that this CPU runs (some twenty minutes).
SANITIZE := build/sanitize
sanitize: $(STAMP)
	cmake -S native -B $(SANITIZE) -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DHASTEN_SANITIZE=ON "-DHASTEN_LEVELS=$(LEVELS)"
	cmake --build $(SANITIZE) --parallel
	rm -rf $(SANITIZE)/src && mkdir -p $(SANITIZE)/src && cp -r src/hasten $(SANITIZE)/src/ && rm -f $(SANITIZE)/src/hasten/kernels/*.so
	cmake --install $(SANITIZE) --prefix $(SANITIZE)/src
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 PYTHONPATH=$(SANITIZE)/src \
	$(BIN)/python -m pytest tests/kernels tests/lm/test_runner.py tests/lm/test_sampler.py tests/lm/test_soak.py \
	-p no:cacheprovider -n 2 --dist loadfile

# Ten thousand random requests, each against its run alone (some ten minutes).
soak-engine: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/lm/lm_soak.py --requests 10000

# Other engines to measure against, each in an environment of its own. llama.cpp compiles for some minutes, once.
PEERS ?= .peers

peers: $(patsubst benchmarks/peers/requirements/%.txt,$(PEERS)/%/.installed,$(wildcard benchmarks/peers/requirements/*.txt))

$(PEERS)/%/.installed: benchmarks/peers/requirements/%.txt constraints.txt
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "llama.cpp needs a C++ compiler: apt-get install g++" >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	@echo '*' > $(PEERS)/.gitignore
	CMAKE_ARGS="-DGGML_NATIVE=ON" nice $(@D)/bin/python -m pip install --progress-bar on -c constraints.txt -r $<
	touch $@

clean:
	rm -rf build dist site $(VENV)
