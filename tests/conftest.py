"""What every test shares: hypothesis settings, how it is compiled, and the `gpu` marker."""

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

# Folders about the bits of single operations, which are held to what users' compilers make of them.
# What the others run takes milliseconds, and twice as long to compile at LLVM's highest level.
_COMPILED_AS_BY_USERS = {"numerics", "rotations", "sparsity", "ops", "pallas_kernels"}


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    """Compiles at LLVM's level 0 what is not about bits; XLA's own passes are all there."""
    folder = request.path.relative_to(pathlib.Path(__file__).parent).parts[0]
    is_quick = folder not in _COMPILED_AS_BY_USERS
    if jax.config.read("jax_disable_most_optimizations") != is_quick:
        jax.clear_caches()  # functions that are there already were compiled the other way
        jax.config.update("jax_disable_most_optimizations", is_quick)


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
