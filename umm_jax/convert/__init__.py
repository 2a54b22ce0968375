"""Weights across the border: to and from PyTorch layouts, and proof that the numbers agree."""
