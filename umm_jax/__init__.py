"""umm_jax: train, evaluate, serve and convert conversational unified multimodal models in JAX."""

__version__ = "0.1.0"
