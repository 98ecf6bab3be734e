"""How good a model is: one way to measure, for training and for the comparison.

interval: confidence intervals by the bootstrap
measuring: the same prompts for all models, and metrics of their masks
metrics: the metrics, by name
object_matching: precision, recall and F1 of objects found without a prompt, and the rule for it
seen_images: which images a model has seen in training
simulated_clicks: how good a mask gets from one simulated click to the next
"""
