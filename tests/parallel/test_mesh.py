import jax
import pytest

from lowbit_jax.parallel import batch_sharding, make_mesh, parse_mesh


def test_the_first_devices_make_a_mesh_that_jit_partitions_by_itself():
    mesh = make_mesh(2, 1, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[:4]
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    others = jax.devices()[:3:-1]
    assert list(make_mesh(4, devices=others).devices.flat) == others


def test_sequences_are_cut_over_data_and_fsdp_and_copied_over_tensor():
    assert batch_sharding(make_mesh(2, 2, 2)).shard_shape((8, 6)) == (2, 6)
    assert batch_sharding(make_mesh(2, 2, 2), 1).shard_shape((3, 8, 6)) == (3, 2, 6)


def test_a_mesh_that_cannot_be_is_refused():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=rf"{count} x 2 x 1 needs {2 * count} devices, got"):
        make_mesh(count, 2, 1)
    with pytest.raises(ValueError, match=r"must be at least 1, got \(2, 0, 1\)"):
        make_mesh(2, 0, 1)


def test_a_mesh_is_named_by_its_three_sizes():
    assert parse_mesh("2x4x1") == (2, 4, 1)
    for text in ("8", "2x4", "2x4x0", "2x4x1x1", "2 x 4 x 1", "axbxc"):
        with pytest.raises(ValueError, match=r"must be DATAxFSDPxTENSOR, got"):
            parse_mesh(text)
