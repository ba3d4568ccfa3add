import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from lowbit_jax.analysis.kernel_times import KernelTime, kernel_times, operation_names


@pytest.fixture
def trace_dir(tmp_path):
    meta = [
        {
            "ph": "M",
            "pid": 1,
            "tid": 7,
            "name": "thread_name",
            "args": {"name": "Stream #7(Compute)"},
        },
        {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "XLA Ops"}},
    ]
    kernels = [
        {"ph": "X", "pid": 1, "tid": 7, "name": "gemm", "dur": 5.0, "args": {"hlo_op": "dot.1"}},
        {"ph": "X", "pid": 1, "tid": 7, "name": "gemm", "dur": 6.0, "args": {"hlo_op": "dot.2"}},
        {"ph": "X", "pid": 1, "tid": 7, "name": "add", "dur": 2.0, "args": {"hlo_op": "fusion"}},
        {"ph": "X", "pid": 1, "tid": 7, "name": "sub_3", "dur": 1.0, "args": {"hlo_op": "graph"}},
        {"ph": "X", "pid": 1, "tid": 8, "name": "gemm", "dur": 99.0},  # Derived line, no kernel.
    ]
    folder = tmp_path / "plugins" / "profile" / "1"
    folder.mkdir(parents=True)
    with gzip.open(folder / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": meta + kernels}, file)
    return tmp_path


def test_kernels_add_up_by_name(trace_dir):
    expected = [KernelTime("gemm", 11.0, 2), KernelTime("add", 2.0, 1), KernelTime("sub_3", 1.0, 1)]
    assert kernel_times(trace_dir) == expected


def test_kernels_add_up_by_operation(trace_dir):
    rows = kernel_times(trace_dir, {"dot.1": "mlp", "dot.2": "mlp"})
    assert rows == [
        KernelTime("mlp", 11.0, 2),
        KernelTime("fusion", 2.0, 1),
        KernelTime("graph", 1.0, 1),
    ]


def test_kernels_of_a_cuda_graph_are_found_by_their_name(trace_dir):
    rows = kernel_times(trace_dir, {"sub.3": "loss"})
    assert KernelTime("loss", 1.0, 1) in rows


def test_operation_names_read_compiled_programs():
    def layer(x):
        with jax.named_scope("mlp"):
            return x @ x

    text = jax.jit(layer).lower(jnp.ones((8, 8))).compile().as_text()
    assert any("mlp" in name for name in operation_names(text).values())


def test_a_missing_trace_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no .*trace"):
        kernel_times(tmp_path)
