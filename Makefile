# make install   into .venv
# make toy    install, then all stages on generated videos (about 15 minutes on 2 CPU cores)
# make test   install, then the tests
# make lint   install, then ruff
PYTHON ?= python3
VENV = .venv/installed

install: $(VENV)

toy: $(VENV)
	PYTHON=.venv/bin/python bash toy.sh

test: $(VENV)
	.venv/bin/python -m pytest -q -n 2 --dist loadfile tests

lint: $(VENV)
	.venv/bin/ruff check .

# the marker is newer than requirements.txt once everything in it is installed
$(VENV): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

.PHONY: install toy test lint
