"""The training loop's parts: checkpoints, log, optimizers, processes, signals."""
