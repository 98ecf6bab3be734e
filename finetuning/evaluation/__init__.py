"""How good a model is: one way to measure, for training and for the comparison.

interval: bootstrap confidence intervals
measuring: give all models the same prompts and compute the metrics of their masks
metrics: the metrics, by name
object_matching: precision, recall and F1 of objects found without a prompt; its thresholds
seen_images: which images a model has seen in training
simulated_clicks: the IoU of a mask after each simulated click
"""
