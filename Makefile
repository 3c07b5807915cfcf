# Every command of the project; each one does the set-up that it needs first. VENV=DIR shares an environment.

VENV ?= .venv
# The demo's arguments: make demo ARGS="--steps 20 --device cuda"
ARGS ?=

VENV_DIR := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))
PY := "$(VENV_DIR)/bin/python"

# This checkout's own package, in front of whatever else the environment holds.
export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
# One Python for every call of cargo: another one would make it build the bridge again.
export PYO3_PYTHON := $(VENV_DIR)/bin/python

.DEFAULT_GOAL := help
# Steps share two things that two of them must not use at once: cargo's folder and the processor.
.NOTPARALLEL:
.PHONY: help setup packages demo doctor test lint test-rust test-python test-peft test-kernels test-matrix bench fuzz gpu wheel clean

help:
	@echo "make demo          train a small model twice, on PEFT's backend and on this one"
	@echo "make test          every test: lint, cargo, pytest, PEFT's own suite"
	@echo "make lint          formatting and lints alone"
	@echo "make bench         benchmarks, against PEFT and plain torch"
	@echo "make fuzz          what reads the sideband's bytes, under libFuzzer, FUZZ_SECONDS=60 a target"
	@echo "make gpu           verify, sanitise and measure the CUDA kernels on this machine's device (needs no Rust)"
	@echo "make doctor        what is on, and why"
	@echo "make wheel         the wheel, into dist/"
	@echo "make test-kernels  of those, the CUDA kernels alone (on a CPU, under the host executor)"
	@echo "make test-matrix   one wheel on two versions of torch and of Python, three of PEFT (downloads about 5 GB)"
	@echo "make clean         remove what was built here; the environment stays"
	@echo "VENV=DIR make ...  use, or make, the environment in DIR instead of .venv"

setup:
	@sh tools/python tools/setup.py --venv "$(VENV_DIR)"

packages:
	@sh tools/python tools/setup.py --venv "$(VENV_DIR)" --no-native

demo: setup
	@$(PY) -m tsugi_kpool demo $(ARGS)

doctor: setup
	@$(PY) -m tsugi_kpool doctor

test: lint test-rust test-python test-peft

lint: setup
	@cargo fmt --version >/dev/null && cargo clippy --version >/dev/null || \
		{ echo "cargo fmt or cargo clippy is missing: install both (rustup component add rustfmt clippy)." >&2; exit 1; }
	cargo fmt --check
	cargo clippy --quiet --all-targets --features executor -- -D warnings
	cargo clippy --quiet --release --features extension,cuda -- -D warnings
	$(PY) -m ruff check
	$(PY) -m ruff format --check --quiet python tests benches tools examples
	$(PY) -m mypy
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --document-private-items

# With the CUDA kernels, on the CPU under the host executor, some of it under sanitizers.
test-rust: setup
	cargo test --quiet --features executor

# Small layers by the thousand: threads that sleep while they wait leave the processor to whoever has work.
test-python test-peft: export OMP_WAIT_POLICY ?= passive

# Beside it, in the time that the processors wait: a minute of each of the sideband's fuzz targets.
test-python: setup
	@FUZZ_SECONDS=60 tools/beside "tools/fuzz" $(PY) -m pytest -q -n 3 --dist loadfile

test-peft: setup
	$(PY) tests/peft_suite/run.py

bench: setup
	cargo bench
	for name in layer buffer pool; do $(PY) -m benches $$name || exit 1; done

fuzz:
	@tools/fuzz

# Without a library of this checkout, on a machine that has no Rust, the installed wheel is measured.
gpu:
	@if [ -e python/tsugi_kpool/_native.abi3.so ]; then $(PY) -m benches gpu $(ARGS); \
		else env -u PYTHONPATH python3 -m benches gpu $(ARGS); fi

wheel: packages
	$(PY) -m maturin build --release --out dist

test-kernels: setup
	cargo test --features executor --test executor --test kernels

# maturin builds the native library for the wheel, so the one for this checkout is not needed.
test-matrix: packages
	$(PY) tools/matrix.py

clean:
	rm -rf target build dist demo-out python/tsugi_kpool/_native.abi3.so
