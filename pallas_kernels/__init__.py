"""GPU kernels, each held to a reference in plain `jax.numpy`; and the tools that compare and time them."""
