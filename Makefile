# make setup   a .venv with everything that the scripts and the tests need
# make demo    trains a small model on drawn images, compares it, segments one image
# make test    sets up what is missing, then runs the tests
# make lint    checks style and formatting

ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := .venv/Scripts
else
PYTHON ?= python3
BIN := .venv/bin
endif
READY := .venv/ready

.PHONY: setup demo test lint

setup: $(READY)

$(READY): requirements.txt requirements-dev.txt
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

lint: $(READY)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
