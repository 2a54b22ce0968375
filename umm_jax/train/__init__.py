"""Training: state, optimizer, step, checkpoints, metrics, and the one loop that uses them."""
