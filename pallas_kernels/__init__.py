"""GPU kernels, each held to a reference in plain `jax.numpy`, and tools to compare and time them."""
