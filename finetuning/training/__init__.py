"""Fine-tuning: the recipe, the steps, and the files of a run.

auto_values: what auto means for a run
earlier_runs: moves an earlier run in the output folder aside
learner: what learns: weights, optimizer, learning rate, compiled decoder
learning_rate_trial: --lr auto
losses: the loss of a training step
options: the command line, and how it resolves to a Recipe and a Machine
recipe: all values that say how a model is fine-tuned
recipe_options: the options that change single values of it
repeats: several trainings by one command: --runs and --folds
run_files: what a run saves, and how it is resumed
training_log: training statistics, train_log.csv, the learning curve
weight_average: the mean of the weights of --runs
"""
