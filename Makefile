# Everything runs in .venv, made from requirements.lock; every target may be run twice.
PYTHON ?= python3.11
FACTORY_HOME ?= $(CURDIR)/.factory
export FACTORY_HOME
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cksum requirements.lock | cut -d' ' -f1)

.PHONY: help demo test browser up down status lint venv

help:
	@echo "make demo   20 experts, one merge, one table (starts the local stack and leaves it up)"
	@echo "make test   every test, against a stack of its own"
	@echo "make browser  headless Chromium for the tests that look at pages, where there is none (70 MB, no root)"
	@echo "make up | down | status   the local stack: S3, MLflow, Ray"
	@echo "make lint   ruff and mypy"

venv: $(STAMP)

$(STAMP): requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -r requirements.lock
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: up
	@eval "$$($(BIN)/python -m infra.stack env)"; status=0; id="demo-$$(date +%Y%m%d-%H%M%S)"; \
	trap '$(BIN)/ray job stop --address "$$RAY_API_SERVER_ADDRESS" "$$id"; exit 130' INT TERM; \
	$(BIN)/ray job submit --address "$$RAY_API_SERVER_ADDRESS" --submission-id "$$id" --working-dir . \
	  --runtime-env-json "$$($(BIN)/python -m infra.environment)" -- \
	  python pipeline/main.py --config pipeline/configs/quickstart.yaml --report "$(CURDIR)/demo-report" $(ARGS) \
	  || status=$$?; \
	echo; $(BIN)/python -m infra.stack status || true; \
	echo "  report         $(CURDIR)/demo-report/report.html"; \
	echo "  stop           make down"; \
	exit $$status

# Two files at a time, each process with a stack of its own: much of a test is waiting for services. One thread in each:
# threads of torch that wait for each other do so by spinning, and two teams of them on two cores are 5 times slower.
# In the order of their names, so that whole runs (tests/e2e) come first: by itself xdist begins with the files of many
# tests, which are the short ones, and one process is left with the longest files while the other has nothing to do.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

browser: $(STAMP)
	@$(BIN)/python -m tests.e2e.browser

up: $(STAMP)
	@$(BIN)/python -m infra.stack up

down: $(STAMP)
	@$(BIN)/python -m infra.stack down

status: $(STAMP)
	@$(BIN)/python -m infra.stack status

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
