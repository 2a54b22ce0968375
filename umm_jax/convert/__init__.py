"""Weights to and from PyTorch: ``umm convert from-torch``, ``to-torch`` and ``from-parts``."""
