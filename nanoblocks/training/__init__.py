"""The parts of the training loop: checkpoints, run folder, log, optimizers, processes, signals."""
