"""GPU kernels, each held to a reference in plain `jax.numpy`; tools to compare and time them."""
