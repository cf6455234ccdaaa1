# make demo   see speech become facial animation, from nothing
# make test   the whole suite (what CI runs)
# make lint   ruff, mypy, import-linter
.PHONY: demo test lint campaign clean

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check
WHAT := pyproject.toml constraints.txt

demo: $(VENV)/demo.installed
	$(BIN)/pmm demo

test: $(VENV)/test.installed
	$(BIN)/pytest

# The longer forms of the tests: hours, not minutes.
campaign: $(VENV)/test.installed
	$(BIN)/pytest tests/campaign

lint: $(VENV)/lint.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/demo.installed: EXTRAS := synth
$(VENV)/test.installed: EXTRAS := synth,test
$(VENV)/lint.installed: EXTRAS := synth,test,lint
$(VENV)/%.installed: $(WHAT)
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
