# What a day of work needs. `make quick` before every commit, `make test` before every merge.
# Runs the tools of .venv where there is one (scripts/install.sh makes it), else those on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
WORKERS ?= auto

.PHONY: quick test docs site lock format

quick: ## style, types, and every test that trains nothing
	ruff check .
	ruff format --check .
	mypy & types=$$!; \
	python -m pytest -q -m "not trains and not slow" -n $(WORKERS) --hypothesis-profile quick; tests=$$?; \
	wait $$types && exit $$tests

test: ## everything
	bash scripts/test.sh

docs: ## the pages that are written by a program
	python scripts/make_flags_page.py
	python scripts/make_layouts_table.py

site: ## all pages as HTML, in site/
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

lock: ## constraints.txt, from what is installed in .venv
	python scripts/lock.py

format:
	ruff check --fix .
	ruff format .
