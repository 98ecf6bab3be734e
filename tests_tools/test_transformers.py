"""Hugging Face's Sam2Model takes the exported folder."""

from pathlib import Path

import pytest
import torch
from conftest import Segment, compare
from transformers import Sam2Model, Sam2Processor

from finetuning import export


def open_sam2(checkpoint: Path, folder: Path, multimask_output: bool) -> Segment:
    output = folder / checkpoint.stem
    export.main(["--to", "transformers", "--finetuned", str(checkpoint), "--output", str(output)])
    model = Sam2Model.from_pretrained(output)
    processor = Sam2Processor.from_pretrained(output)

    @torch.no_grad()
    def segment(image, places):
        # An image, its objects, the points of each; or the boxes of the image
        prompts = (
            {
                "input_points": [[[list(place)] for place in places]],
                "input_labels": [[[1] for _ in places]],
            }
            if len(places[0]) == 2
            else {"input_boxes": [[list(place) for place in places]]}
        )
        inputs = processor(image, **prompts, return_tensors="pt")
        answer = model(**inputs, multimask_output=multimask_output)
        masks = processor.post_process_masks(answer.pred_masks, inputs["original_sizes"])[0]
        best = answer.iou_scores[0].argmax(-1)
        return [mask[chosen].numpy() for mask, chosen in zip(masks, best, strict=True)]

    return segment


@pytest.mark.parametrize("kind", ["best", "single"])
def test_it_gives_our_mask(mini, tmp_path, kind):
    def opener(path: Path) -> Segment:
        return open_sam2(path, tmp_path, multimask_output=kind == "best")

    compare("transformers", kind, mini, opener)
