"""What every test shares: hypothesis settings, a compilation cache, and the `gpu` marker."""

import gc
import os
import pathlib

import hypothesis
import jax
import pytest

hypothesis.settings.register_profile(
    "lowbit", max_examples=50, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("lowbit")

# Compiling dominates the suite: a second run, and the other worker, reuse what one has compiled.
_CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / f"jax-{jax.__version__}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_num_cpu_devices", 8)  # simulated: shardings are tested without a cluster
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def pytest_collection_modifyitems(items):
    """The longest test first; tests marked `gpu` are skipped where JAX sees no CUDA device."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/train/test_resume.py"))
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish(session):
    """Spares the collector of garbage the modules: going through them took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
