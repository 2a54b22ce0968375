"""What a module keeps for its backward pass, and its gradients, to hold rematerialisation to both."""

import jax

from umm_jax import compiler


def kept_and_gradients(loss, state):
    """(numbers that wait for the backward pass, gradients) of loss(state)."""
    pull = jax.eval_shape(lambda s: jax.vjp(loss, s)[1], state)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
    return kept, jax.jit(jax.grad(loss), compiler_options=compiler.once(jax.devices()))(state)
