"""What every test shares: hypothesis settings, how it is compiled, and the `gpu` marker."""

import gc
import importlib.metadata
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

# On CPU, compilation has three costs that short programs never earn back. LLVM's level 1 compiles
# random numbers in 0.6 of the time of level 3 and contracts products and sums as that does. The
# emitters of fusions by way of MLIR set up a context for each program, and passes for each fusion:
# without them programs compile in 0.6 of the time. A program is split for 32 threads otherwise.
if not importlib.metadata.entry_points(group="jax_plugins"):
    os.environ["XLA_FLAGS"] = " ".join(
        (
            "--xla_backend_optimization_level=1",
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "--xla_cpu_parallel_codegen_split_count=1",
            os.environ.get("XLA_FLAGS", ""),
        )
    )

# These compare the bits of a compiled function with those of another one, or of single operations.
# They are compiled at level 1: level 0, at which everything else is, in half the time, contracts no
# product and sum into one operation, so that there the claim would be a weaker one.
_BITS = (
    "numerics/",
    "ops/test_quantized_dot.py",
    "optim/test_admm.py",
    "optim/test_cage.py",
    "optim/test_eco.py",
    "optim/test_low_precision_adam.py",
)


def _is_quick(path):
    return not path.relative_to(pathlib.Path(__file__).parent).as_posix().startswith(_BITS)


@pytest.fixture(autouse=True, scope="module")
def compilation(request):
    """Compiles at LLVM's level 0 in most folders; on CPU alone."""
    is_quick = _is_quick(request.path) and jax.default_backend() == "cpu"
    if jax.config.read("jax_disable_most_optimizations") != is_quick:
        jax.clear_caches()  # what is there already was compiled the other way
        jax.config.update("jax_disable_most_optimizations", is_quick)


def pytest_collection_modifyitems(items):
    """The longest test first; tests marked `gpu` are skipped where JAX sees no CUDA device."""
    items.sort(key=lambda item: _is_quick(item.path))  # what is compiled alike in a row
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
    gc.set_threshold(200_000, 20, 50)
