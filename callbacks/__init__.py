"""What observes or adapts a training run: logging, EMA, held-out loss, samples, checkpoints. None computes a loss."""
