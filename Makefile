# Every target creates .venv first, and again only when pyproject.toml or constraints.txt changed.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --retries 10 --timeout 180
RUN := $(BIN)/linearize --model smollm2-135m --quick
# Two processes of fixed folders: with two xdist workers a collection once differed between them. One PyTorch thread each:
# the tensors are tiny.
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -p no:cacheprovider
HALF := tests/kernels tests/mixers tests/stages

.PHONY: install demo controls test test-half test-rest soak lint clean

install: .venv/installed

# torch comes first and pinned: an unpinned torch may resolve to another build and pull gigabytes of CUDA.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "linearize needs Python 3.11, 3.12 or 3.13 with the venv module; none was found."; exit 2; }
	$(PYTHON) -m venv .venv
	for attempt in 1 2 3; do $(PIP) install -q torch==2.13.0 -c constraints.txt && break; sleep 5; done
	for attempt in 1 2 3; do $(PIP) install -q -e '.[dev]' -c constraints.txt && break; sleep 5; done
	$(BIN)/python -c 'import linearize, torch, transformers, pytest'
	touch $@

demo: install
	$(RUN) --recipe liger --output out/demo

controls: install
	$(BIN)/python scripts/controls.py --output out

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	+$(MAKE) -j2 --no-print-directory --output-sync=target test-half test-rest

test-half:
	$(TEST) -q $(HALF)

test-rest:
	$(TEST) -q tests $(addprefix --ignore=,$(HALF))

soak: install
	$(TEST) -m soak -q
	LINEARIZE_FUZZ=2000 $(TEST) -q tests/test_fuzz.py

clean:
	rm -rf .venv out dist build *.egg-info
