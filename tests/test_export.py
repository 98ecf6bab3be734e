"""Exports: other packages load the same model, and what is there is not overwritten."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CPU, draw_pair, snapshot
from safetensors.torch import load_file

from finetuning import export
from finetuning.export import transformers_config
from finetuning.model.checkpoints import checkpoint_path, save_checkpoint
from finetuning.model.models import MODELS, build_predictor, load_predictor
from finetuning.model.weight_names import transformers_weights
from finetuning.segmentation.predicting import encode_images, predict_masks
from finetuning.segmentation.prompts import make_prompt

# Of mini, one name for each rule of renaming
TELLING = {
    "vision_encoder.backbone.patch_embed.projection.weight": (32, 3, 7, 7),
    "vision_encoder.backbone.pos_embed_window": (1, 32, 8, 8),
    "vision_encoder.backbone.blocks.1.attn.qkv.weight": (192, 32),
    "vision_encoder.backbone.blocks.1.layer_norm2.weight": (64,),
    "vision_encoder.backbone.blocks.1.mlp.proj_in.weight": (256, 64),
    "vision_encoder.backbone.blocks.1.mlp.proj_out.weight": (64, 256),
    "vision_encoder.backbone.blocks.1.proj.weight": (64, 32),
    "vision_encoder.neck.convs.0.weight": (128, 256, 1, 1),
    "no_memory_embedding": (1, 1, 128),
    "shared_image_embedding.positional_embedding": (2, 64),
    "prompt_encoder.shared_embedding.positional_embedding": (2, 64),
    "prompt_encoder.point_embed.weight": (4, 128),
    "prompt_encoder.not_a_point_embed.weight": (1, 128),
    "prompt_encoder.no_mask_embed.weight": (1, 128),
    "prompt_encoder.mask_embed.conv1.weight": (4, 1, 2, 2),
    "prompt_encoder.mask_embed.layer_norm1.weight": (4,),
    "prompt_encoder.mask_embed.conv2.weight": (16, 4, 2, 2),
    "prompt_encoder.mask_embed.layer_norm2.weight": (16,),
    "prompt_encoder.mask_embed.conv3.weight": (128, 16, 1, 1),
    "mask_decoder.iou_token.weight": (1, 128),
    "mask_decoder.mask_tokens.weight": (4, 128),
    "mask_decoder.obj_score_token.weight": (1, 128),
    "mask_decoder.conv_s0.weight": (16, 128, 1, 1),
    "mask_decoder.upscale_conv1.weight": (128, 32, 2, 2),
    "mask_decoder.upscale_layer_norm.weight": (32,),
    "mask_decoder.upscale_conv2.weight": (32, 16, 2, 2),
    "mask_decoder.transformer.layers.0.mlp.proj_in.weight": (2048, 128),
    "mask_decoder.transformer.layers.1.mlp.proj_out.weight": (128, 2048),
    "mask_decoder.transformer.layers.1.layer_norm4.weight": (128,),
    "mask_decoder.transformer.layers.1.self_attn.o_proj.weight": (128, 128),
    "mask_decoder.transformer.final_attn_token_to_image.q_proj.weight": (64, 128),
    "mask_decoder.transformer.layer_norm_final_attn.weight": (128,),
    "mask_decoder.output_hypernetworks_mlps.3.proj_in.weight": (128, 128),
    "mask_decoder.output_hypernetworks_mlps.3.layers.0.weight": (128, 128),
    "mask_decoder.output_hypernetworks_mlps.3.proj_out.weight": (16, 128),
    "mask_decoder.iou_prediction_head.proj_in.weight": (256, 128),
    "mask_decoder.iou_prediction_head.layers.0.weight": (256, 256),
    "mask_decoder.iou_prediction_head.proj_out.weight": (4, 256),
    "mask_decoder.pred_obj_score_head.proj_out.weight": (1, 128),
}
OF_VIDEO = {
    "maskmem_tpos_enc", "mask_downsample", "memory_attention", "memory_encoder", "no_mem_pos_enc",
    "no_obj_embed_spatial", "no_obj_ptr", "obj_ptr_proj", "obj_ptr_tpos_proj",
}  # fmt: skip


@pytest.fixture(scope="module")
def random_tiny(tmp_path_factory) -> Path:
    """Return a checkpoint of tiny with random weights, as of a training at 512 pixels."""
    path = tmp_path_factory.mktemp("checkpoints") / "sam2_best.pt"
    model = build_predictor("tiny", CPU).model
    save_checkpoint(path, model, model_name="tiny", settings={"image_size": 512})
    return path


def run_python(lines: str) -> dict[str, object]:
    """Run the Python that an export ends with; return its variables."""
    variables: dict[str, object] = {}
    exec("\n".join(line.strip() for line in lines.splitlines()), variables)
    return variables


# transformers' format, without transformers


def test_each_weight_for_images_gets_one_name_and_none_is_left(random_mini):
    state_dict = load_predictor(None, random_mini, CPU)[0].model.state_dict()
    of_images = {
        name: weight for name, weight in state_dict.items() if name.split(".")[0] not in OF_VIDEO
    }
    weights = transformers_weights(state_dict)
    # Four embeddings become one; the frequencies are there twice
    assert len(weights) == len(of_images) - 3 + 1 == 249
    twice = weights["shared_image_embedding.positional_embedding"]
    assert count(weights) == count(of_images) + twice.numel()
    assert {name: tuple(weights[name].shape) for name in TELLING} == TELLING
    assert torch.equal(twice, weights["prompt_encoder.shared_embedding.positional_embedding"])
    for label, embedding in enumerate(weights["prompt_encoder.point_embed.weight"]):
        own = state_dict[f"sam_prompt_encoder.point_embeddings.{label}.weight"]
        assert torch.equal(embedding, own[0])


def count(weights: dict[str, torch.Tensor]) -> int:
    return sum(weight.numel() for weight in weights.values())


def test_the_folder_holds_the_weights_and_what_size_of_images_they_are_for(run_script, random_tiny):
    outcome = run_script(
        export.main, "--to", "transformers", "--finetuned", random_tiny, "--output", "내보낸 모델"
    )
    assert outcome.status == 0, outcome.err
    assert "wrote model.safetensors, config.json, preprocessor_config.json to 내보낸" in outcome.out
    folder = Path("내보낸 모델")
    config, processor = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in ("config.json", "preprocessor_config.json")
    )
    assert config["model_type"] == "sam2" and config["prompt_encoder_config"]["image_size"] == 512
    vision = config["vision_config"]
    assert vision["backbone_feature_sizes"] == [[128, 128], [64, 64], [32, 32]]
    assert vision["backbone_config"]["blocks_per_stage"] == [1, 2, 7, 2]
    loaded = load_predictor(None, checkpoint_path("내보낸 모델"), CPU)[0].model
    own = load_predictor(None, random_tiny, CPU)[0].model.image_encoder.state_dict()
    assert loaded.image_size == 512
    assert all(
        torch.equal(loaded.image_encoder.state_dict()[name], weight) for name, weight in own.items()
    )
    assert vision["backbone_config"]["num_attention_heads_per_stage"] == [1, 2, 4, 8]
    assert processor["size"] == {"height": 512, "width": 512}
    assert processor["mask_size"] == {"height": 128, "width": 128}  # of masks given as prompts
    expected = transformers_weights(load_predictor(None, random_tiny, CPU)[0].model.state_dict())
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


# Ultralytics


def test_ultralytics_gets_the_same_weights_by_the_name_it_insists_on(run_script, random_tiny):
    outcome = run_script(export.main, "--to", "ultralytics", "--finetuned", random_tiny)
    assert outcome.status == 0, outcome.err
    assert "model = SAM('output/export/sam2.1_t.pt')" in outcome.out
    assert "imgsz=512" in outcome.out  # Ultralytics takes 1024 by itself
    original, copy = (
        torch.load(path, weights_only=True) for path in (random_tiny, "output/export/sam2.1_t.pt")
    )
    assert copy.keys() == original.keys() and copy["settings"] == original["settings"]
    assert copy["model"].keys() == original["model"].keys()
    assert all(
        torch.equal(copy["model"][name], weight) for name, weight in original["model"].items()
    )


def test_mini_is_refused_for_ultralytics(run_script, random_mini):
    outcome = run_script(export.main, "--to", "ultralytics", "--finetuned", random_mini)
    assert outcome.status == 2 and not Path("output").exists()
    assert outcome.err.startswith("error: Ultralytics has no SAM 2.1 mini; ")
    assert outcome.err.count("\n") == 1


# Bad input


@pytest.mark.parametrize("to", ["ultralytics", "transformers"])
@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"])
def test_a_file_that_is_no_model_ends_in_one_line(run_script, to, content):
    if content is not None:
        Path("모델.pt").write_bytes(content)
    outcome = run_script(export.main, "--to", to, "--finetuned", "모델.pt")
    assert outcome.status == 2 and not Path("output").exists()
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert "모델.pt" in outcome.err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_a_file_that_is_there_stays_as_it_is(run_script, random_mini, name):
    Path("theirs").mkdir()
    Path("theirs", name).write_text("theirs", encoding="utf-8")
    before = snapshot(Path("theirs"))
    outcome = run_script(
        export.main, "--to", "transformers", "--finetuned", random_mini, "--output", "theirs"
    )
    assert outcome.status == 2 and f"{name} exists already" in outcome.err
    assert snapshot(Path("theirs")) == before


@pytest.mark.parametrize("reached", ["config.json", "preprocessor_config.json"])
def test_an_export_that_was_stopped_is_done_by_the_same_command(
    run_script, monkeypatch, random_mini, reached
):
    options = ("--to", "transformers", "--finetuned", random_mini)

    def stop(path: Path, content: bytes) -> None:
        write(path, content)
        if path.name == reached:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        write = export._write
        patch.setattr(export, "_write", stop)
        assert run_script(export.main, *options).status == 130
    assert Path("output/export", reached).exists()
    outcome = run_script(export.main, *options)
    assert outcome.status == 0, outcome.err
    left = snapshot(Path("output/export"))
    assert run_script(export.main, *options, "--output", "at once").status == 0
    assert snapshot(Path("at once")) == left


def test_an_output_that_is_a_file_ends_in_one_line(run_script, random_mini):
    Path("taken").write_text("", encoding="utf-8")
    outcome = run_script(
        export.main, "--to", "transformers", "--finetuned", random_mini, "--output", "taken"
    )
    assert outcome.status == 2 and outcome.err.count("\n") == 1


# transformers itself, where it is installed


@pytest.mark.parametrize("model_name", MODELS)
def test_transformers_builds_weights_of_these_names_and_shapes(model_name):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    model = build_predictor(model_name, CPU).model
    config = transformers.Sam2Config.from_dict(transformers_config(model))
    with torch.device("meta"):
        expected = transformers.Sam2Model(config).state_dict()
    weights = transformers_weights(model.state_dict())
    assert {name: weight.shape for name, weight in weights.items()} == {
        name: weight.shape for name, weight in expected.items()
    }


@pytest.mark.parametrize("image_size", [256, 128])
def test_transformers_computes_what_sam_2_computes(run_script, tmp_path, random_mini, image_size):
    transformers = pytest.importorskip("transformers", minversion="4.56")
    model = load_predictor(None, random_mini, CPU, image_size)[0].model
    for weight in model.parameters():  # some of which start as zeros
        weight.data += 0.02 * torch.randn_like(weight)
    save_checkpoint(tmp_path / "best.pt", model, settings={"image_size": image_size})
    outcome = run_script(export.main, "--to", "transformers", "--finetuned", "best.pt")
    assert outcome.status == 0, outcome.err
    theirs = run_python(outcome.out.partition("in Python:\n")[2])
    _, loading = transformers.Sam2Model.from_pretrained("output/export", output_loading_info=True)
    assert not any(loading.values()), loading

    predictor, _ = load_predictor(None, tmp_path / "best.pt", CPU)
    image, _ = draw_pair(0)
    (height, width), point = image.shape[:2], [60, 40]
    with torch.no_grad():
        features = encode_images(predictor, [image])
        own = predict_masks(predictor, features, [make_prompt([point])], [(height, width)])
        their_inputs = theirs["processor"](image, input_points=[[[point]]], return_tensors="pt")
        scaled = [[[[point[0] / width * image_size, point[1] / height * image_size]]]]
        assert torch.allclose(their_inputs["input_points"].float(), torch.tensor(scaled))
        own_pixels = predictor._transforms(image)[None]
        assert (their_inputs["pixel_values"] - own_pixels).abs().max() < 0.05  # of 8 bits
        answer = theirs["model"](pixel_values=own_pixels, input_points=torch.tensor(scaled))
    torch.testing.assert_close(answer.pred_masks[0], own.mask_logits[:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.iou_scores[0], own.iou_scores[:, 1:], rtol=1e-4, atol=1e-4)
