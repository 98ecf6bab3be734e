"""SAM 2: build and load it, train its encoder, and cache its image features.

cache_places: open the feature cache: on disk, in memory, or on a GPU
checkpoints: read weights from files without running code; save them
feature_cache: image features, computed once per image, cached on disk, held in memory or on a GPU
image_variants: images to encode, as they are or changed first
loading: load fine-tuned models and the original, on a device that works
model: a model together with the source of its image features
models: the SAM 2.1 models: download, build, load
trainable_encoder: train the image encoder: adapters, or all weights
weight_names: the names of the weights in files of other programs
"""
