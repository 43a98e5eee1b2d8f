# Everything runs in .venv, made on first use and made again when dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-full test-hosts zoo-table check format clean help bench-accuracy bench-core bench-peers bench-spans bench-widths bench-unclipped bench-target bench-tuning bench-tenth bench-norms bench-privacy bench-precision bench-engine bench-memory bench-flower bench-speed

help:
	@echo "make demo       run the main job: three methods on 50 simulated clients, under 3 minutes"
	@echo "make test       the tests (make test-full adds the slow ones, test-hosts only those on network namespaces)"
	@echo "make zoo-table  run every method on every model of the tests' zoo, and write docs/what-works.md from that"
	@echo "make check      lint, types, import contracts"
	@echo "make format     format the code"
	@echo "make bench-…    experiments behind docs/benchmarks: bench-core, -peers, -spans, -widths, -unclipped, -target, -accuracy, -tuning, -tenth, -norms, -privacy, -precision, -engine, -memory, -flower, -speed; each with QUICK=1 in seconds"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "ScaleFL needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group dev --editable ".[demo,flower,mlflow,privacy,tensorboard]"
	@touch $@

demo: $(STAMP)
	$(BIN)/scalefl plan examples/demo.toml
	$(BIN)/scalefl run examples/demo.toml --overwrite
	$(BIN)/scalefl run examples/demo.toml --overwrite --set name=demo-fedavg --set 'method={name="fedavg"}'
	$(BIN)/scalefl run examples/demo.toml --overwrite --set name=demo-fedavg-micro \
		--set 'method={name="fedavg", means="micro-batches"}'
	$(BIN)/scalefl report runs/demo-scalefl runs/demo-fedavg runs/demo-fedavg-micro

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-full: $(STAMP)
	$(BIN)/python -m pytest --hypothesis-profile default --ignore tests/zoo
	$(BIN)/python -m pytest tests/zoo -n auto

test-hosts: $(STAMP)
	$(BIN)/python -m pytest tests/hosts

# Every method on every model of the zoo, and from what they came to the page of what works with what.
zoo-table: $(STAMP)
	rm -rf build/zoo
	SCALEFL_ZOO_RESULTS=build/zoo $(BIN)/python -m pytest tests/zoo -k whole_zoo -n auto
	PYTHONPATH=tests $(BIN)/python -m zoo.page build/zoo docs/what-works.md

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Experiments: minutes to hours; small results are committed in docs/benchmarks. SCALEFL_DATA names the data folder.
# QUICK=1: the same code in seconds, into build/benchmarks; figures mean nothing then.
OUT := $(if $(QUICK),build/benchmarks,docs/benchmarks)
SHORT := $(if $(QUICK),--quick)

bench-accuracy bench-core bench-peers bench-spans bench-widths bench-unclipped bench-target bench-tuning bench-tenth bench-norms bench-privacy bench-precision: bench-%: $(STAMP)
ifdef QUICK
	$(BIN)/python benchmarks/quick.py $* --out $(OUT)
else
	$(BIN)/scalefl compare benchmarks/$*.toml --out $(OUT)/$*
endif

bench-memory: $(STAMP)
	for what in planning prediction models tenth floors rungs federation; do $(BIN)/python benchmarks/memory.py $$what --out $(OUT) $(SHORT) || exit 1; done

bench-engine: $(STAMP)
	$(BIN)/python benchmarks/engine.py --out $(OUT)/engine $(SHORT)

# The last part reads what bench-precision has written.
bench-flower: $(STAMP) bench-precision
	for what in rounds bytes scale precision; do $(BIN)/python benchmarks/flower.py $$what --out $(OUT) $(SHORT) || exit 1; done

# Makes an environment for each peer on first use (2.5 GB), in ~/.cache/scalefl-speed; needs a quiet machine.
bench-speed: $(STAMP)
	for what in peers whole small stages stages-last formats at-once tried profile scaling; do $(BIN)/python benchmarks/speed.py $$what --out $(OUT) $(SHORT) || exit 1; done
