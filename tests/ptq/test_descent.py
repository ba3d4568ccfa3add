"""What a kept run of an optimizer is held against."""

import jax.numpy as jnp
import optax
import pytest

from lowbit_jax.ptq.descent import Diverged, Keep, descend


def run(params, keep=None, learning_rate=0.1):
    def loss_fn(params, batch):
        return jnp.mean((params["layers"] - batch) ** 2)

    batches, options = [jnp.zeros(())] * 2, {"steps": 2, "interval": 1, "keep": keep}
    return descend("test", loss_fn, optax.sgd(learning_rate), params, batches, **options)


def test_any_other_parameter_is_another_run(tmp_path):
    params = {"layers": jnp.ones((2, 256, 512))}  # the last layer alone has 131,072 entries
    keep = Keep(tmp_path, {}, every_s=0)
    run(params, keep)
    run(params, keep)
    w = params["layers"]
    for other in (w.at[0].multiply(-1), w.at[0, 0, 0].set(2), w.reshape(512, 512)):
        with pytest.raises(ValueError, match="begun with other settings, params_sha256"):
            run({"layers": other}, keep)


def test_a_loss_that_is_not_finite_ends_it():
    with pytest.raises(Diverged, match="the loss must stay finite, got inf before step 2"):
        run({"layers": jnp.ones((4,))}, learning_rate=1e30)
