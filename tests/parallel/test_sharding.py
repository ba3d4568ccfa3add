"""Where parts lie, and how many bytes a device holds; nothing here is compiled but a copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit_jax.numerics import FP8_E4M3, MXFP4, quantize_matrices
from lowbit_jax.parallel import (
    Parameter,
    device_bytes,
    gather,
    make_layout,
    make_mesh,
    parameters_of,
    sharding_table,
    shardings,
)

LAYERS, D, F, V = 2, 32, 64, 128
AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {"down": ("layers", "embed", "mlp"), "scale": ("layers", "norm")},
}
PARAMS = {
    "embedding": jax.ShapeDtypeStruct((V, D), jnp.float32),
    "layers": {
        "down": jax.ShapeDtypeStruct((LAYERS, D, F), jnp.bfloat16),
        "scale": jax.ShapeDtypeStruct((LAYERS, D), jnp.float32),
    },
}
GRADS = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), PARAMS)
STATE = (jax.ShapeDtypeStruct((), jnp.int32), {"m": GRADS, "v": GRADS})
PARAMETERS = parameters_of(PARAMS, AXES)


def specs(layout, over, params=PARAMS):
    places = shardings(params, parameters_of(params, AXES), layout, over)
    return jax.tree.map(lambda place: tuple(place.spec), places)


def test_tensor_cuts_names_and_zero_cuts_rows():
    layout = make_layout(make_mesh(2, 2, 2), 3)
    assert specs(layout, layout.stage.optimizer) == {
        "embedding": (("tensor", "fsdp", "data"), None),
        "layers": {"down": (None, ("fsdp", "data"), "tensor"), "scale": (None, None)},
    }
    assert specs(layout, layout.stage.parameters) == {
        "embedding": (("tensor", "fsdp"), None),
        "layers": {"down": (None, "fsdp", "tensor"), "scale": (None, None)},
    }


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2), (1, 8, 1), (1, 1, 8), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bytes_of_a_device_follow_from_mesh_and_stage(mesh, zero):
    table = sharding_table(
        make_layout(make_mesh(*mesh), zero), PARAMETERS, PARAMS, GRADS, None, STATE
    )
    data, fsdp, tensor = mesh
    ranks = data * fsdp
    matrices = {"params": 4 * V * D + 2 * LAYERS * D * F, "floats": 4 * (V * D + LAYERS * D * F)}
    norms = 4 * LAYERS * D  # whole on each device
    of_params = tensor * ((fsdp if fsdp > 1 else data) if zero == 3 else 1)
    of_grads = tensor * (ranks if zero >= 2 else 1)
    assert table.device_bytes == (
        matrices["params"] // of_params + norms,
        matrices["floats"] // of_grads + norms,
        2 * (matrices["floats"] // (tensor * ranks) + norms) + 4,  # the counter
    )


def test_devices_hold_the_bytes_that_the_accounting_says():
    layout = make_layout(make_mesh(2, 2, 2), 3)
    for leaf, place in zip(
        jax.tree.leaves(STATE),
        jax.tree.leaves(shardings(STATE, PARAMETERS, layout, layout.stage.optimizer)),
        strict=True,
    ):
        array = jax.device_put(np.zeros(leaf.shape, leaf.dtype), place)
        held = {shard.data.nbytes for shard in array.addressable_shards}
        assert held == {device_bytes(leaf, place)}


def test_an_axis_that_does_not_divide_stays_whole_and_the_table_says_so():
    params = {"w": jax.ShapeDtypeStruct((6, 10), jnp.float32)}
    parameters = parameters_of(params, {"w": ("heads", "embed")})
    layout = make_layout(make_mesh(1, 2, 4))
    # 6 heads do not divide by 4 devices; over fsdp they do.
    assert specs_of(layout, parameters["w"]) == ("fsdp", None)
    table = sharding_table(layout, parameters, params, params, None, params)
    (row,) = table.rows
    assert (row.cuts, row.undivided) == (("whole", "whole", "heads:fsdp"), ("tensor",))
    assert "600 (tensor divides no axis)" in str(table)  # 240 + 240 + 120 bytes
    assert "data 1 x fsdp 2 x tensor 4 holds 240 bytes of weights, 240 of gradients" in str(table)


def specs_of(layout, parameter, shape=None, over=("fsdp", "data")):
    return tuple(layout.place(parameter, shape or parameter.shape, over).spec)


def test_tensor_cuts_whole_heads_only():
    parameter = Parameter(("heads", "embed"), (32, 8))  # 2 heads of width 16
    mesh = make_mesh(1, 1, 4)
    assert specs_of(make_layout(mesh, pieces={"heads": 2}), parameter) == (None, None)
    assert specs_of(make_layout(mesh, pieces={"heads": 4}), parameter) == ("tensor", None)


def test_codes_scales_and_what_else_a_parameter_has_lie_as_it_does():
    def quantized(spec):
        return {
            "down": jax.eval_shape(lambda w: quantize_matrices(w, spec), PARAMS["layers"]["down"])
        }

    stored = quantized(FP8_E4M3)
    parameters = parameters_of(stored, {"down": ("layers", "embed", "mlp")})
    assert parameters["down"].shape == (LAYERS, D, F)
    layout = make_layout(make_mesh(2, 2, 2), 3)
    held = shardings({"m": stored, "count": np.zeros(())}, parameters, layout, ("fsdp", "data"))
    assert tuple(held["count"].spec) == ()
    assert tuple(held["m"]["down"].codes.spec) == (None, ("fsdp", "data"), "tensor")
    assert tuple(held["m"]["down"].scales.spec) == (None, ("fsdp", "data"), None)  # one a row
    # Packed, with 64 / 32 = 2 scales a row: codes and scales divide among 2, scales not among 8.
    packed = quantized(MXFP4)
    for tensor, scales in ((2, "tensor"), (8, None)):
        held = shardings(packed, parameters, make_layout(make_mesh(1, 1, tensor)), ())
        assert tuple(held["down"].codes.spec) == (None, None, "tensor")
        assert tuple(held["down"].scales.spec) == (None, None, scales)


def test_stages_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"zero must be one of 1, 2, 3, got 4"):
        make_layout(make_mesh(2), 4)


def test_what_is_gathered_is_the_same_and_so_is_its_gradient():
    layout = make_layout(make_mesh(1, 4, 1), 3)
    parameter = Parameter(("mlp", "embed"), (8, 4))
    whole, cut = (layout.place(parameter, (8, 4), over) for over in ((), ("fsdp",)))

    @jax.jit
    def twice(w):
        used, pull = jax.vjp(lambda w: gather(w, whole, cut), w)
        return used, pull(2 * used)[0]

    w = jax.device_put(np.arange(32.0, dtype=np.float32).reshape(8, 4), cut)
    used, gradient = twice(w)
    np.testing.assert_array_equal(used, w)  # Exact: moved, not computed.
    np.testing.assert_array_equal(gradient, 2 * w)
    assert used.sharding.is_equivalent_to(whole, 2)
    assert gradient.sharding.is_equivalent_to(cut, 2)
