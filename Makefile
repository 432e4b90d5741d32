# make pretrain [DATA="a.jsonl b.jsonl.gz"]   the whole way once: text -> tokens -> 3D-parallel training -> Hugging Face
# make curriculum-run CORPUS=folder           a curriculum on real text: killed, resumed, on other ranks, made longer
# make test                                   all tests
# make test-parity                            every three parallel options together, on up to 16 ranks
# make test-faults [FLAGS="--trials 200 --json FILE"]   kills, full disks, damage to real jobs; goes on where FILE ends
# make check                                  format, lint, types, tests
# make selftest [FLAGS="--folder DIR"]         this host before a long run: GEMM, all-reduce, disk, clock, space, memory; RANKS=N
# make bench [FLAGS=--quick]                  every kernel beside its peers, on this GPU -> kernels/bench/results/
# make bench-step                             the training step of polylm-1.7b beside transformers, on this GPU
# make bench-host                             host cost, CPU tokens/s and memory beside transformers; needs no GPU
# make bench-data                             a data set opened, ordered, read; preprocessing; beside megatron-core; no GPU
# make bench-dedup                            deduplication by stages, MB/s and memory; beside datatrove's own; no GPU
# make bench-checkpoint                       stall, bandwidth and memory of saves and loads beside torch's; needs no GPU
# make bench-effective-time FLAGS="--checkpoint FILE"   what share of its time a job trains; FILE: bench-checkpoint's --json
# make bench-record [FLAGS=FILE]              the fastest implementations of those results -> what `auto` takes
# make bench-tune [FLAGS="--head-dim 64"]     tile sizes of attention's kernels, tried out on this GPU
# make kernels-report                         registers, spills, shared memory of the kernels; needs no GPU
# (these ten use PYTHON as it is and install nothing; FLAGS=.. reaches the script; TEXT_FLAGS=.. the part of bench-data on text)
# PYTHON=..   the interpreter .venv is made with       PIP_ARGS=..   flags for pip, a package index for example
PYTHON ?= python3
PIP_ARGS ?=
DATA ?=
CORPUS ?=
FLAGS ?=
TEXT_FLAGS ?=
RANKS ?= $(shell nvidia-smi -L 2>/dev/null | grep -c . | sed 's/^0$$/1/')
BIN := .venv/bin
# A host whose Python has a CUDA build of torch >= 2.11 keeps it; anywhere else constraints.txt decides.
HAS_CUDA_TORCH = $(shell $(PYTHON) -c "import torch; v = torch.__version__.split('.'); \
	print(int(torch.version.cuda is not None and (int(v[0]), int(v[1])) >= (2, 11)))" 2>/dev/null || echo 0)

.PHONY: pretrain curriculum-run test test-parity check install clean selftest test-faults
.PHONY: bench bench-step bench-host bench-data bench-dedup bench-checkpoint bench-effective-time
.PHONY: bench-record bench-tune kernels-report
.DELETE_ON_ERROR:

pretrain: .venv/installed
	$(BIN)/python examples/quickstart.py $(if $(DATA),--data $(DATA)) $(FLAGS)

curriculum-run: .venv/installed-test
	$(BIN)/python examples/curriculum_run.py --corpus $(CORPUS) $(FLAGS)

test: .venv/installed-test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted
	$(BIN)/python -m pytest

test-parity: .venv/installed-test
	$(BIN)/python -m pytest -m sweep tests/parallel/test_sweep.py $(FLAGS)

test-faults: .venv/installed-test
	PYTHONPATH=kernels:. $(BIN)/python tests/faults/campaign.py $(FLAGS)

check: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted
	$(BIN)/python -m pytest

install: .venv/installed-test

selftest: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(RANKS) tools/selftest.py $(FLAGS)

bench:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/run.py $(FLAGS)

bench-step:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/step.py $(FLAGS)

bench-host:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/host.py $(FLAGS)

bench-data:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/data.py $(FLAGS); status=$$?; \
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/preprocess.py $(TEXT_FLAGS) && exit $$status

bench-dedup:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/dedup.py $(FLAGS)

bench-checkpoint:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/checkpoint.py $(FLAGS)

bench-effective-time:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/effective_time.py $(FLAGS)

bench-record:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/record.py $(FLAGS)

bench-tune:
	PYTHONPATH=kernels:. $(PYTHON) kernels/bench/tune_attention.py $(FLAGS)

kernels-report:
	PYTHONPATH=kernels:. $(PYTHON) -m megapoly_kernels.report $(FLAGS)

.venv/constraints.txt: constraints.txt
	$(PYTHON) -m venv $(if $(filter 1,$(HAS_CUDA_TORCH)),--system-site-packages) .venv
	grep -v -E '$(if $(filter 1,$(HAS_CUDA_TORCH)),^(torch|triton)==,^$$)' constraints.txt > $@

.venv/installed: .venv/constraints.txt setup.py pyproject.toml megapoly/data/_sampler.cpp
	$(BIN)/pip install $(PIP_ARGS) -q --disable-pip-version-check -c .venv/constraints.txt -e '.[hf]'
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install $(PIP_ARGS) -q --disable-pip-version-check -c .venv/constraints.txt -e '.[hf,test]'
	touch $@

clean:
	rm -rf data/tiny data/own-* runs build *.egg-info
