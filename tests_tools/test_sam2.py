"""SAM 2's own predictor, video predictor and mask generator load our checkpoint as it is."""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import CPU, SAME, Sample, Segment, add_row, compare, iou
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator
from sam2.build_sam import build_sam2, build_sam2_video_predictor

from finetuning.model.models import MODELS, load_predictor, make_predictor
from finetuning.segmentation.predicting import encode_images, predict_masks, upscale_masks
from finetuning.segmentation.prompts import make_prompt

CONFIG = MODELS["mini"].config
BUILD = {"device": "cpu", "hydra_overrides_extra": list(MODELS["mini"].overrides)}


def as_arguments(place: tuple[float, ...], names: tuple[str, str]) -> dict[str, np.ndarray]:
    """Return a prompt as arguments; names: of the points and of their labels."""
    if len(place) == 4:
        return {"box": np.array(place, np.float32)}
    return dict(zip(names, (np.array([place], np.float32), np.array([1], np.int32)), strict=True))


# The predictor


def open_predictor(checkpoint: Path, multimask_output: bool) -> Segment:
    predictor = make_predictor(build_sam2(CONFIG, checkpoint, **BUILD))

    def segment(image, places):
        predictor.set_image(image)
        masks = []
        for place in places:
            prompt = as_arguments(place, ("point_coords", "point_labels"))
            found, scores, _ = predictor.predict(**prompt, multimask_output=multimask_output)
            masks.append(found[scores.argmax()] > 0)
        return masks

    return segment


@pytest.mark.parametrize("kind", ["best", "single"])
def test_the_predictor_gives_our_mask(mini, kind):
    compare("sam2 image", kind, mini, partial(open_predictor, multimask_output=kind == "best"))


# The video predictor


def open_video_predictor(checkpoint: Path, folder: Path) -> Segment:
    predictor = build_sam2_video_predictor(CONFIG, checkpoint, **BUILD)
    options = [cv2.IMWRITE_JPEG_QUALITY, 100, *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x111111)]

    def segment(image, places):
        for frame in range(3):
            cv2.imwrite(str(folder / f"{frame}.jpg"), image[..., ::-1], options)
        state = predictor.init_state(str(folder))
        for number, place in enumerate(places):
            prompt = as_arguments(place, ("points", "labels"))
            predictor.add_new_points_or_box(state, frame_idx=0, obj_id=number, **prompt)
        frames = [logits[:, 0].numpy() > 0 for *_, logits in predictor.propagate_in_video(state)]
        assert len(frames) == 3
        return list(frames[0])  # the others take a memory, which is random in mini

    return segment


@pytest.mark.parametrize(("prompt", "kind"), [("point", "best"), ("box", "single")])
def test_the_video_predictor_gives_our_mask(mini, tmp_path, prompt, kind):
    compare("sam2 video", kind, mini, partial(open_video_predictor, folder=tmp_path), (prompt,))


# The mask generator


def generate(checkpoint: Path, sample: Sample) -> list[dict]:
    model = build_sam2(CONFIG, checkpoint, **BUILD)
    # By default 0.8 and 0.95, which no mask of mini reaches
    thresholds = {"pred_iou_thresh": 0.7, "stability_score_thresh": 0.7}
    generator = SAM2AutomaticMaskGenerator(model, points_per_side=8, **thresholds)
    generator.predictor = make_predictor(model)
    return generator.generate(sample.image)


def test_the_mask_generator_gives_our_masks(mini):
    predictor, _ = load_predictor(None, mini.finetuned, CPU)
    for size, samples in mini.samples.items():
        same, before, after = [], [], []
        for sample in samples:
            original, records = (generate(path, sample) for path in (mini.original, mini.finetuned))
            for found, best in ((original, before), (records, after)):
                best += [
                    best_iou(mask, [r["segmentation"] for r in found]) for mask in sample.masks
                ]
            features, image_size = encode_images(predictor, [sample.image]), sample.image.shape[:2]
            for record in records:
                prompt = make_prompt(record["point_coords"])
                logits = predict_masks(predictor, features, [prompt], [image_size]).mask_logits
                ours = upscale_masks(predictor, logits[:, 1:], image_size)[0].detach() > 0
                same.append(best_iou(record["segmentation"], list(ours.numpy())))
        assert same
        row = add_row("sam2 generator", "three", "grid", size, same, before, after)
        assert row.ours >= SAME and row.finetuned > row.original, row


def best_iou(mask: np.ndarray, others: list[np.ndarray]) -> float:
    return max((iou(mask, other) for other in others), default=0.0)
