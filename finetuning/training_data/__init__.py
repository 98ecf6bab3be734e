"""What training shows the model: images, prompts and true masks.

batches: the training data, as batches for the decoder
epoch_sampling: the steps of an epoch: which images and objects, in random order
prompt_sampling: random prompts, and clicks that correct the model's answers
thin_objects: what a grid loses of thin objects, and how fine it must be
training_masks: the true masks of training, on the grid of the loss
"""
