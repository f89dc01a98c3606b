# Short names for what a developer types often; `make check` is what CI runs inside its environment.
PYTHON ?= python3
.PHONY: check style typing contracts test

check: test

style:
	ruff format .
	ruff check --fix .

# The link lets type checkers and editors see the checkout under its import name.
.cache/typing/vcompress:
	mkdir -p .cache/typing
	ln -sfn "$(CURDIR)" .cache/typing/vcompress

typing: .cache/typing/vcompress
	$(PYTHON) -m mypy

contracts:
	lint-imports

test:
	$(PYTHON) -m pytest
