"""What training shows the model: images, prompts and true masks.

augmentation: training images varied: mirrored, turned, cropped, recoloured
augmentation_picture: augmentation.png
batches: the training data, as batches for the decoder
cleaning_choice: which parts and holes of masks are too small to be true
encoding: encode the images of a training and their variants
epoch_sampling: the steps of an epoch: which images and objects, in random order
prompt_sampling: random prompts, and clicks that correct the model's answers
thin_objects: what a grid loses of thin objects, and how fine it must be
training_masks: the true masks of training, on the grid of the loss
"""
