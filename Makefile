# The two commands of the README: `make demo` and `make test`. Both make .venv first.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PACKAGES := __init__.py compress recover kernels pipelines reports
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test proofs check docs gpu gpu-packages venv interop rivals publish clean FORCE

demo: venv
	$(BIN)/pipeline run compress_and_recover

# Two processes, each with the files that the other has not; a test needs one core. Bytecode is kept, for the many processes that tests start.
test: venv
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n 2 --dist loadfile -m "not slow and not interop"

# Longer proofs: what does not fit into the minutes of `make test`.
proofs: venv
	$(BIN)/python -P -m pytest -m slow

# auto-gptq and llama.cpp in environments of their own, and the tests in which they read and write our files; those of lm-eval and of transformers serve, extras;
# and vLLM's, in another environment where the machine has AVX-512.
interop: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt lm-eval 'transformers[serving]'
	VENV_INTEROP=$(CURDIR)/.venv-interop bash tests/interop/build.sh
	VENV_LLAMA=$(CURDIR)/.venv-llama sh tests/interop/build_llama_cpp.sh
	VENV_VLLM=$(CURDIR)/.venv-vllm bash tests/interop/build_vllm.sh
	$(BIN)/python -P -m pytest -m interop tests/interop

# AutoRound and GPTQModel in environments of their own, for their rows of the grid, demo and gptq-speed tables.
rivals: .venv-rivals/.installed .venv-gptqmodel/.installed

# It is built from source against a torch that is newer than ours and is there before it.
.venv-gptqmodel/.installed: tests/interop/gptqmodel.txt
	$(PYTHON) -m venv .venv-gptqmodel
	.venv-gptqmodel/bin/python -m pip install --quiet --disable-pip-version-check "torch>=2.14.1" "setuptools>=84.2.1,<85" wheel ninja packaging numpy
	.venv-gptqmodel/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r tests/interop/gptqmodel.txt
	touch $@

.venv-rivals/.installed: tests/interop/rivals.txt constraints.txt
	$(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/interop/rivals.txt
	touch $@

# What a card has to show, in parts of two minutes that go on in the next call: PART=tests|demo|shape|kernels|decode|train (else all in turn), SECONDS=
# of each, AGAIN=1 to measure anew, PYTHON= any with torch, Triton and transformers. Nothing is installed: the import map is a link.
gpu:
	@mkdir -p runs/gpu/import && ln -sfn $(CURDIR) runs/gpu/import/bitmend
	@PYTHONPATH=$(CURDIR)/runs/gpu/import:$(CURDIR)/runs/gpu/packages$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -P -m bitmend.pipelines.gpu $(PART) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(AGAIN),--again) $(OPTIONS)

# What a GPU machine without a network may lack, fetched where there is one and brought along in runs/gpu/packages; `make gpu` says what.
FETCH ?= pydantic
gpu-packages:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade --target runs/gpu/packages --only-binary=:all: \
		--python-version $(or $(PYTHON_VERSION),3.12) -c constraints.txt $(FETCH)

check: venv
	$(BIN)/ruff check .
	$(BIN)/pyright

# The site, in build/site: a link, an anchor or a page that is not there ends it.
docs: venv
	$(BIN)/python -P docs/site_source.py
	$(BIN)/mkdocs build # not --quiet: it takes the warnings away before they are counted

venv: $(VENV)/.installed

# The editable install is a farm of links, one for each file: a new file needs it again.
$(VENV)/.files: FORCE
	@mkdir -p $(VENV)
	@find $(PACKAGES) -type f -not -name '*.pyc' -not -path '*/__pycache__/*' | LC_ALL=C sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.files | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "setuptools>=77" wheel
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]" --config-settings editable_mode=strict
	touch $@

clean:
	rm -rf $(VENV) build bitmend.egg-info

FORCE:

# Reference results into reports/published, all tables or TABLE=compress|decompose|recover|perp|grid|dtype|demo|demo-dtypes|budgets|operators|gguf|kernels-static|scale|gptq-speed. Hours; can be stopped and continued.
TABLE ?= compress decompose recover perp grid dtype demo demo-dtypes budgets operators gguf kernels-static scale gptq-speed
publish: venv
	for table in $(TABLE); do $(BIN)/python -P -m bitmend.pipelines.publish.publishing $$table || exit; done
