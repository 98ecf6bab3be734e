"""Fine-tuning: the recipe, the parts of a training step, and the files of a run.

batches: the training data: images in random order with random prompts, as batches
earlier_runs: moves an earlier run in the output folder aside
learner: what learns: weights, optimizer, learning rate, compiled decoder
learning_rate_trial: --lr auto
losses: the loss of a training step
options: the command line, and how it resolves to a Recipe and a Machine
prompt_sampling: random prompts, and clicks that correct the model's answers
recipe: all values that say how a model is fine-tuned
repeats: several trainings by one command: --runs and --folds
run_files: what a run saves, and how it is resumed
training_log: training statistics, train_log.csv, the learning curve
training_masks: the true masks of training, on the grid of the loss
"""
