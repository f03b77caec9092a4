PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test torture bench

# The stamp, not the folder: an installation that was cut short is done again.
.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/.installed-tests: .venv/.installed Makefile
	$(PY) -m pip install -q pytest pytest-xdist ruff tokenizers hypothesis
	touch $@

demo: .venv/.installed
	$(PY) prepare_data.py stdlib
	rm -rf out/demo-mdlm out/demo-gpt out/demo-block
	@echo "== masked diffusion: text out of noise, in minutes"
	$(PY) train_mdlm.py --preset=tiny --out=out/demo-mdlm
	$(PY) sample.py --ckpt=out/demo-mdlm/ckpt.pt --n=2 --length=256 --watch
	$(PY) sample.py --ckpt=out/demo-mdlm/ckpt.pt --infill="def ___(x):" --n=4
	@echo "== the same tokens and parameters, autoregressive and in blocks"
	$(PY) gpt.py --preset=tiny --out=out/demo-gpt
	$(PY) train_block.py --preset=tiny --out=out/demo-block
	$(PY) records/compare.py out/demo-gpt out/demo-block out/demo-mdlm
	$(PY) sample.py --ckpt=out/demo-block/ckpt.pt --race=out/demo-gpt/ckpt.pt --prompt="def "

test: .venv/.installed-tests
	$(PY) -m ruff check --line-length=100 --select=E,F,W,I,B .
	$(PY) -m pytest -q -n 2 tests

torture: .venv/.installed-tests
	$(PY) -m pytest -q --torture tests/test_survive.py

bench: .venv/.installed
	$(PY) tests/bench.py
