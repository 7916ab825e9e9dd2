# make demo   set up, then fine-tune the demo voice on this machine's CPU or GPU; share it on a Hub that runs here
# make test   set up, then check the code and run the tests
# make bench  set up, then measure training and preparation on this machine's CPU; a GPU: benchmarks/gpu_all.sh
# make docs   set up, then build the documentation as a site; a broken link is an error
# make base   make the demo's base anew, from text to weights: hours on two cores; needs flite, espeak-ng, a compiler
# make claims train the demo in several ways and compare how they speak: an hour or more; needs what make base leaves
# make clean  delete the demo run, so that the next make demo begins anew

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := runs/demo
BENCH := runs/bench
BASE := runs/base

# Some images forbid it; every program started here, and the tests start hundreds, would then compile its packages anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint bench docs base claims clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python scripts/train.py --config configs/demo.yaml
	@test -d $(DEMO)/evaluation || { \
	  echo "Speaking 20 sentences that nobody read to it, before and after, and writing down what is heard:"; \
	  $(BIN)/python scripts/evaluate.py --run $(DEMO) --voice examples/demo_base --preview --out $(DEMO)/evaluation \
	    --texts examples/demo_voice/unseen.txt --num_texts 20 --temperature 0.3 --asr pocketsphinx --grammar examples/demo_voice/grammar.jsgf; }
	$(BIN)/python tests/demo_hub.py $(DEMO)

test: $(INSTALLED) lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	rm -rf $(BENCH) && mkdir -p $(BENCH)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/train_step.py --device cpu --json $(BENCH)/train_step.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/train_step.py --device cpu --size released --clips 512 \
	  --micro_batches 1 --micro_batch_size 4 --repeats 1 --warm_up 0 --json $(BENCH)/train_step_released.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/packing.py --device cpu --json $(BENCH)/packing.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/profile_step.py --device cpu --json $(BENCH)/profile_step.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/prepare.py --device cpu --size released --clips 32 --batches 1 8 \
	  --num_proc 1 2 --json $(BENCH)/prepare.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/end_to_end.py --device cpu --epochs 1 --json $(BENCH)/end_to_end.json
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/scaling.py --device cpu --json $(BENCH)/scaling.json

docs: $(INSTALLED)
	@test -x $(BIN)/zensical || { echo "error: the documentation takes Python 3.11 or newer; remove .venv and run make with PYTHON=python3.11."; exit 1; }
	# In a copy: it keeps a cache beside its settings and deletes what it doesn't know there.
	rm -rf build/docs && mkdir -p build/docs && cp -r docs mkdocs.yml build/docs
	cd build/docs && $(CURDIR)/$(BIN)/zensical build --strict
	@echo "The documentation is in build/docs/site/index.html."

# What is finished is not done again; deleting runs/base begins anew.
base: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[corpus]'
	test -f $(BASE)/corpus/metadata.csv || $(BIN)/python scripts/make_base_corpus.py --output $(BASE)/corpus --overwrite
	$(BIN)/python scripts/train_dvae.py --config configs/small_dvae.yaml --data.root $(BASE)/corpus --training.output_dir $(BASE)/dvae
	$(BIN)/python scripts/make_demo_base.py start --corpus $(BASE)/corpus --dvae $(BASE)/dvae --output $(BASE)/start --overwrite
	$(BIN)/python scripts/train.py --config configs/small_base.yaml
	$(BIN)/python scripts/train.py --config configs/small_base.yaml --model.base $(BASE)/gpt/export --model.from_scratch false \
	  --training.output_dir $(BASE)/gpt_2 --training.max_steps 3500 --optim.learning_rate 6e-4 --optim.warmup_steps 100
	$(BIN)/python scripts/make_demo_base.py ship --run $(BASE)/gpt_2 --output examples/demo_base --overwrite

claims: $(INSTALLED)
	$(BIN)/python benchmarks/claims.py --output runs/claims --voices $(BASE)/corpus

clean:
	rm -rf $(DEMO)

# About 5 GB and two minutes. uv installs the same packages as pip, several times faster. Both read constraints.txt, which pins every version.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than Python 3.10; run make with PYTHON=python3.11 or newer."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "uv>=0.5" && \
	  $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]' || \
	  $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
