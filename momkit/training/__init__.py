"""Training a small language model on a task: config, loop, checkpoints, evaluation, generation, plots, the demo."""
