"""Records on disk, synthesis, packing and the input pipeline: numpy and bytes, never JAX."""
