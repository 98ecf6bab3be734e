"""Fine-tuning: the recipe, the steps, and what a run writes.

batches: the training images in random order, as batches
earlier_runs: an earlier run in the output folder, moved aside
learner: what learns: weights, optimizer, compiled decoder
learning_rate_trial: the learning rate: its schedule, and --lr auto
log: what steps report, train_log.csv, the learning curve
losses: the loss of a step
options: the options of a training
prompt_sampling: the prompts that training shows
recipe: the recipe: all values that say how a model is fine-tuned
repeats: the same training by other seeds, or on other folds
run_files: what a run saves, and how it is resumed
training_masks: the true masks of training, on the grid of the loss
"""
