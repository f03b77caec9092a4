PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test bench

# The stamp, not the folder: an installation that was cut short is done again.
.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/.installed-tests: .venv/.installed
	$(PY) -m pip install -q pytest ruff tokenizers
	touch $@

demo: .venv/.installed
	$(PY) prepare_data.py stdlib
	rm -rf out/demo
	$(PY) train_mdlm.py --preset=tiny --out=out/demo
	$(PY) sample.py --ckpt=out/demo/ckpt.pt --n=2 --length=256
	$(PY) sample.py --ckpt=out/demo/ckpt.pt --infill="def ___(x):" --n=4

test: .venv/.installed-tests
	$(PY) -m ruff check --line-length=100 --select=E,F,W,I,B .
	$(PY) -m pytest -q tests

bench: .venv/.installed
	$(PY) tests/bench.py
