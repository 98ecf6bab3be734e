"""SAM 2: build, load and prompt it, and cache its image features.

automatic: find all objects of an image without a prompt
cache_places: open the feature cache: on disk, in memory, or on a GPU
checkpoints: read weights from files without running code; save them
drawing: draw masks and prompts on an image
feature_cache: image features, computed once per image, cached on disk, held in memory or on a GPU
loading: load fine-tuned models and the original, on a device that works
model: a model together with the source of its image features
models: the SAM 2.1 models: download, build, load
prompts: points and boxes, and clicks that correct a mask
segmentation: from features and prompts to masks and scores: the one path
trainable_encoder: train the image encoder: adapters, or all weights
weight_names: the names of the weights in files of other programs
"""
