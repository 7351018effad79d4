# setup, setup-colossalai, demo, test, lint, images, clean: everything runs inside .venv, which `setup` makes.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
COLOSSALAI := .venv-colossalai
PYTEST := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

export MLFLOW_DISABLE_TELEMETRY = true
export MLFLOW_MODEL_CATALOG_URI =
export DVC_NO_ANALYTICS = 1
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup setup-colossalai demo test lint images clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	@echo "Installing into .venv: a minute or two, most of it PyTorch."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

setup-colossalai: $(COLOSSALAI)/.installed

# Its own packages, and behind them all of .venv's, which stays as it is.
$(COLOSSALAI)/.installed: $(STAMP) constraints-colossalai.txt
	test -x $(COLOSSALAI)/bin/python || $(BIN)/python -m venv --without-pip $(COLOSSALAI)
	$(COLOSSALAI)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $@.part
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' > "$$(cat $@.part)/project.pth"
	$(COLOSSALAI)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-colossalai.txt
	mv $@.part $@

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro
	$(BIN)/opensora results

# Files in their own order: by the number of their tests the few that run the whole chain would come last, one by one.
# With RETRY=1, tests that failed are run once more, alone on the machine, and what fails again fails.
RERUN = echo && echo "Some tests failed; they alone are run once more." && $(PYTEST) --last-failed --last-failed-no-failures none
test: setup
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder $(if $(RETRY),|| { test $$? = 1 && $(RERUN); })

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint components/images/Containerfile

# BASE: a Debian 12 image, else debootstrap makes one. REGISTRY: where they are pushed to.
images: setup
	$(BIN)/python components/images/build.py $(if $(BASE),--base $(BASE)) $(if $(REGISTRY),--registry $(REGISTRY))

clean:
	rm -rf .venv $(COLOSSALAI) runs outputs .pytest_cache .mypy_cache .ruff_cache .dvc/cache .dvc/tmp
