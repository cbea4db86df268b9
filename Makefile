# Everything runs in .venv, made on first use from requirements.txt. Needs python3 (3.11 or newer) and make.
PYTHON ?= python3
BIN := .venv/bin
# Two workers suit two cores. A file stays on one worker; tests/conftest.py puts the longest first. Compiled modules are
# kept, because the tests start many processes.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

CODE := __main__.py main.py benchmarks configs datasets models parity scripts trainers

.PHONY: demo test test-slow check types format docs clean

demo: .venv/ready
	$(BIN)/python main.py -d digits_lt -m tiny_clip_peft

test: .venv/ready
	$(PYTEST)

# Every test, those of the default tier too.
test-slow: .venv/ready
	$(PYTEST) --dist loadgroup -m "slow or not slow"

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory --jobs 2 --output-sync types site
	$(PYTEST)

# mypy finds modules by their folders, so an ignored folder called tailtune has links to all of them, as in the wheel.
types: .venv/ready
	@if [ -L .mypy_cache/tailtune ]; then rm .mypy_cache/tailtune; fi; mkdir -p .mypy_cache/tailtune
	@for name in $(CODE); do ln -sfn ../../$$name .mypy_cache/tailtune/$$name; done
	@ln -sfn ../../tailtune.py .mypy_cache/tailtune/__init__.py
	cd .mypy_cache && ../$(BIN)/mypy --config-file ../pyproject.toml

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Every page that is made from the code, and then the site.
docs: .venv/ready
	$(BIN)/python scripts/make_options.py
	$(BIN)/python scripts/make_model_list.py
	$(BIN)/python scripts/make_composition.py
	$(MAKE) --no-print-directory site

# The site, from the pages as they are, into site/. A broken link or a page that is in no menu is an error.
.PHONY: site
site: .venv/ready
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .mkdocs_cache site

.venv/ready: requirements.txt requirements-package.txt requirements-parquet.txt requirements-serve.txt requirements-sweep.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; make PYTHON=python3.12 names another"; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (about 5 GB; a few minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	touch $@
