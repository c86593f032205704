# make demo    all methods trained on scikit-learn's digits, probed and measured, offline
# make test    the tests
# make fuzz    the warp under 60,000 generated calls, in some minutes
# make sanitize   the warp's C++ under AddressSanitizer and UndefinedBehaviorSanitizer
# make bench   the warp against what else there is, on the CPU; installs those libraries too
# make bench-train  how fast each script trains, on the CPU
# make bench-gpu  on a GPU: tests, sanitizers, benchmarks of the warp and of training; each also a target of its own
# make reproduce  on a GPU: VTE's Tables 1-4 with three seeds, into RESULTS.md; with DATA=DIR, CIFAR-10 in files, 1-3
# make reproduce-small  the same at a small scale, on two CPU cores in 84 minutes and those of the controls
# make reproduce-paired  phase two on a trained and on an untrained phase one, five seeds at 16 x 16, in three hours
# make reproduce-stl  on a GPU: STL, SimCLR, STL with AugMix, labels for codes; reproduce-stl-small on a CPU
# make lint    ruff
# make setup   .venv with all that is needed and the compiled warp, which the others do first
# make clean   removes what the others made

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/demo
PIP := $(BIN)/python -m pip --disable-pip-version-check install

.PHONY: demo test fuzz sanitize bench bench-train bench-gpu bench-gpu-tests bench-gpu-sanitizers bench-gpu-warp \
    bench-gpu-train reproduce reproduce-cifar10 reproduce-stl10 \
    reproduce-small reproduce-paired reproduce-stl reproduce-stl-small lint setup clean

setup: $(VENV)/.built

# torch first, because the extension is built against it, and with its torchvision.
$(VENV)/.installed:
	$(PYTHON) -m venv $(VENV)
	@echo "installing packages into $(VENV): PyTorch is some gigabytes, which takes minutes"
	@$(PIP) --quiet torch torchvision ninja pybind11 'setuptools>=77' wheel
	@touch $@

# An editable installation: minter_warp/_C...so comes to lie beside the package's other files. pip succeeds without it,
# this does not.
$(VENV)/.built: $(VENV)/.installed setup.py pyproject.toml $(wildcard csrc/*)
	@echo "building the compiled warp; where nvcc is, some minutes, with CUDA"
	@$(PIP) --verbose --no-build-isolation --editable '.[dev]' > $(VENV)/build.log 2>&1 && \
	    $(BIN)/python -c 'import minter_warp._C' 2>> $(VENV)/build.log || { cat $(VENV)/build.log; exit 1; }
	@sed -n 's/^ *\(minter: building.*\)/\1/p' $(VENV)/build.log | tail -n 1
	@$(BIN)/python -c 'import minter_warp; print("built:", minter_warp.build_info())'
	@touch $@

# In two processes of one thread each, a file of tests at a time.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fuzz: setup
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests/test_fuzz.py tests/test_cuda_steps.py

# Python itself is not instrumented, so the sanitizer's runtime is loaded first, and libstdc++ for it to see exceptions.
# Giant allocations must fail as they would without it. inductor, which compiles in other processes, is left out.
SANITIZED := build/sanitized
sanitize: setup
	MINTER_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    PYTHONPATH=$(SANITIZED):. HYPOTHESIS_PROFILE=$(or $(HYPOTHESIS_PROFILE),sanitize) MINTER_SANITIZE=1 \
	    $(BIN)/pytest -o pythonpath= --capture=sys tests/test_warp.py tests/test_fuzz.py tests/test_cuda_steps.py \
	    -k 'not graph_break'

bench: setup
	$(PIP) --quiet kornia opencv-python-headless "ipp; platform_machine == 'x86_64' and sys_platform == 'linux'"
	$(BIN)/python benchmarks/warp.py --output results/warp-cpu.json
	$(BIN)/python benchmarks/warp.py --threads 1 --sizes 32 --output results/warp-cpu-one-thread.json

TRAINING := $(BIN)/python benchmarks/train.py
bench-train: setup
	$(TRAINING) --output results/train-cpu.json
	MINTER_KEEP_MEMORY=0 $(TRAINING) --output results/train-cpu-memory-not-kept.json

# Where nothing can be installed: make -o setup bench-gpu BIN=/the/folder/of/its/python. INTO has what was measured so
# far, whatever ends it.
GPU ?= h200
INTO ?= results
TOOLS ?= memcheck racecheck initcheck synccheck
bench-gpu: bench-gpu-tests bench-gpu-sanitizers bench-gpu-warp bench-gpu-train

bench-gpu-tests: setup
	$(BIN)/python -m pytest tests/test_warp.py tests/test_fuzz.py
	$(BIN)/python -m pytest tests/test_running.py -k gpu

bench-gpu-sanitizers: setup
	for tool in $(TOOLS); do \
	    export PYTORCH_NO_CUDA_MEMORY_CACHING=1; \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python benchmarks/warp.py --device cuda --check --peers && \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m pytest tests/test_fuzz.py -k references || exit 1; \
	done

bench-gpu-warp: setup
	$(BIN)/python benchmarks/warp.py --device cuda --output $(INTO)/warp-$(GPU).json

bench-gpu-train: setup
	$(TRAINING) --device cuda --steps 200 --output $(INTO)/train-$(GPU).json

# The studies (study/study.mk has the rest): stopped and called again, these go on. `make -k -j3 reproduce` on a GPU;
# `timeout 9m make reproduce SEEDS=0` for nine minutes of one seed. DATA=DIR takes CIFAR-10 as files.
DATA ?= cifar10
reproduce: reproduce-cifar10 $(if $(filter cifar10,$(DATA)),reproduce-stl10)

reproduce-cifar10: setup
	$(MAKE) -f study/study.mk vte DATA=$(DATA) PYTHON=$(BIN)/python
	$(BIN)/python study/figures.py errors results/cifar10.json --output results/cifar10-errors.png

reproduce-stl10: setup
	$(MAKE) -f study/study.mk vte DATA=stl10 PYTHON=$(BIN)/python

reproduce-small: setup
	$(MAKE) -f study/study.mk vte SCALE=small DATA=$(DATA) PYTHON=$(BIN)/python
	$(BIN)/python study/figures.py errors results/cifar10-small.json --output results/cifar10-small-errors.png

reproduce-paired: setup
	$(MAKE) -f study/study.mk vte SCALE=paired DATA=$(DATA) PYTHON=$(BIN)/python

reproduce-stl: setup
	$(MAKE) -f study/study.mk stl DATA=$(DATA) PYTHON=$(BIN)/python
	$(if $(filter cifar10,$(DATA)),$(MAKE) -f study/study.mk stl DATA=stl10 PYTHON=$(BIN)/python)

reproduce-stl-small: setup
	$(MAKE) -f study/study.mk stl SCALE=small DATA=$(DATA) PYTHON=$(BIN)/python

lint: setup
	$(BIN)/python -m ruff check .

# All five rows of VTE's tables and STL on 1,442 digits of 12 x 12 pixels: to see them learn, not to compare them.
DEMO := --dataset digits --image-size 12 --precision fp32
FAST := $(DEMO) --recipe fast
PHASE_TWO := $(FAST) --pretrained $(RUNS)/pt.ckpt --epochs 4
TRAINED := $(addprefix $(RUNS)/,avt.ckpt pt.ckpt vte_ba.ckpt vte_infonce1.ckpt vte_infonce2.ckpt stl.ckpt)

demo: setup
	rm -rf $(RUNS)
	$(BIN)/python predictive_transform.py $(FAST) --epochs 15 --output $(RUNS)/pt.ckpt
	$(BIN)/python avt.py $(FAST) --epochs 17 --output $(RUNS)/avt.ckpt
	$(BIN)/python vte_ba.py $(PHASE_TWO) --output $(RUNS)/vte_ba.ckpt
	$(BIN)/python vte_infonce.py $(PHASE_TWO) --critic separated --output $(RUNS)/vte_infonce1.ckpt
	$(BIN)/python vte_infonce.py $(PHASE_TWO) --critic concatenated --output $(RUNS)/vte_infonce2.ckpt
	$(BIN)/python stl.py $(DEMO) --encoder nin --batch-size 128 --epochs 2 --output $(RUNS)/stl.ckpt
	$(BIN)/python study/figures.py curves $(TRAINED:.ckpt=.jsonl) --output $(RUNS)/curves.png
	$(BIN)/python study/figures.py decoded $(RUNS)/avt.ckpt --output $(RUNS)/decoded.png
	$(BIN)/python probe.py $(TRAINED) --features mu --classifiers knn logistic --train-sizes 100 50 --precision fp32 \
	    --json $(RUNS)/probe.json
	$(BIN)/python equivariance.py $(TRAINED) --transformations projective --images 40 --per-image 30 --pairs 800 \
	    --precision fp32 --json $(RUNS)/equivariance.json
	@echo "pictures: $(RUNS)/decoded.png (t, as AVT decodes it) and $(RUNS)/curves.png; numbers: $(RUNS)/*.json"
	@echo "After so few epochs AVT misses the outline (an error above 1) in about one test image of five or six, often of 8, 0, 1."
	@echo "VTE-BA explained hardly any of phase one's z: z is mostly t here, and VTE-BA sees x alone. Its features learned."
	@echo "Trained so briefly, AVT, InfoNCE (2), STL and, depending on the processor's rounding, one more are behind an untrained"
	@echo "encoder by k-NN. By logistic regression all are ahead of it but STL with 50 labels. Raw pixels are ahead of nearly"
	@echo "all: digits of 12 x 12 lie in place and look alike."

clean:
	rm -rf $(VENV) build minter_warp/_C.* *.egg-info runs/demo .pytest_cache .ruff_cache .hypothesis
