# Two commands set everything up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-transformers-matrix test-vllm test-ray test-export test-vlmeval check lint types format benchmarks sanitize sanitize-threads wheel clean

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard src/mopeq/kernels/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## install, then run the main job on the bundled model
	$(BIN)/mopeq quickstart

test: $(STAMP) lint types  ## install, then lint, types and all tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

test-transformers-matrix: $(STAMP)  ## the transformers integration with 5.17, 5.19 and the newest; slow, not in the gate
	scripts/transformers_matrix.sh $(BIN)/python

test-vllm:  ## the vLLM plugin with the real vLLM, in an environment of its own; the gate runs it after the two commands
	scripts/vllm_check.sh $(PYTHON)

test-ray:  ## --ray with the real Ray on several node processes, in an environment of its own; slow, not in the gate
	scripts/ray_check.sh $(PYTHON)

test-export: $(STAMP)  ## exports read by llama.cpp, AutoRound and vLLM, in environments of their own; slow, not in the gate
	scripts/export_check.sh $(PYTHON) $(BIN)/python

test-vlmeval: $(STAMP)  ## mopeq in the real VLMEvalKit, in an environment of its own; not in the gate
	scripts/vlmeval_check.sh $(BIN)/python

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmarks: $(STAMP)  ## the figures of docs/results.md
	$(BIN)/python benchmarks/run.py

NATIVE = tests/kernels tests/test_hadamard.py tests/runtime/test_step.py
SANITIZERS = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined

sanitize: $(STAMP)  ## the kernel's tests under AddressSanitizer and UndefinedBehaviorSanitizer (gcc), then the library anew
	CXX=g++ CXXFLAGS="$(SANITIZERS)" $(BIN)/python hatch_build.py
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/python -m pytest $(NATIVE) -s -k "not environment and not fork and not shapes_without"; \
	  status=$$?; $(BIN)/python hatch_build.py && exit $$status

WITHOUT_POOL = import sys, pytest; from mopeq import native; native._torch_pool = lambda: None; sys.exit(pytest.main(sys.argv[1:]))

sanitize-threads: $(STAMP)  ## the kernel's tests of threads under ThreadSanitizer (gcc), on threads of its own, as torch's pool is not instrumented
	CXX=g++ CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=thread" $(BIN)/python hatch_build.py
	LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS=exitcode=66:ignore_noninstrumented_modules=1 \
	  $(BIN)/python -c "$(WITHOUT_POOL)" $(NATIVE) -s -k "(thread or nothing or repacks or converting or descriptors) and not environment"; \
	  status=$$?; $(BIN)/python hatch_build.py && exit $$status

wheel: $(STAMP)  ## the wheel of this machine in dist/, repaired by auditwheel and tried, and one made without a compiler tried too
	scripts/wheel_check.sh $(BIN)/python dist

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
