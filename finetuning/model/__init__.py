"""SAM 2: built, loaded, prompted, and its image features cached.

automatic: finding all objects of an image without a prompt
cache_places: opening that cache: on disk, in memory, or on a GPU
checkpoints: weights in files, read without running code
drawing: masks and prompts, drawn on an image
feature_cache: image features, computed once per image and cached on disk
loading: a fine-tuned model and the original, on a device that works
model: a model with the source of its image features
models: the SAM 2.1 models: download, build, load
prompts: points and boxes, and clicks that correct a mask
segmentation: from features and prompts to masks and scores: the one path
trainable_encoder: the image encoder that learns: adapters, or all of it
"""
