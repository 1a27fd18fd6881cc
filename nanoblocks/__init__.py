"""
What the commands share: training, decoding, published checkpoints, experiments. `model.py` can be read, and
used, without it.
"""
