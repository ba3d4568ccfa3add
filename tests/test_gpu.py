"""What can only be seen on a GPU: it computes what the CPU computes, by the path it should take."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lowbit_jax.models import llama_config
from lowbit_jax.models.llama import Llama, LlamaConfig, llama_rules
from lowbit_jax.numerics import dequantize, quantize
from lowbit_jax.numerics.presets import PRESETS
from lowbit_jax.numerics.spec import POWER_OF_TWO_RULES
from lowbit_jax.ops import dispatch, recipes
from lowbit_jax.ops.attention import attention
from lowbit_jax.ops.quantized_dot import quantized_dot
from lowbit_jax.ops.report import explain
from lowbit_jax.rotations import Hadamard
from lowbit_jax.train import StepPlan, create_state, make_train_step
from pallas_kernels.compat import hopper_obstacle
from pallas_kernels.rotate_quantize import op
from pallas_kernels.rotate_quantize.reference import finite_absmax
from pallas_kernels.testing import assert_bitwise_equal

pytestmark = pytest.mark.gpu


def normal(shape, dtype=jnp.float32, seed=0):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.random.normal(jax.random.key(seed), shape, dtype)


def on_both(fn, *args):
    """The results of `fn` on the CPU and on the GPU, both as NumPy arrays."""
    results = []
    for device in (jax.devices("cpu")[0], jax.devices("gpu")[0]):
        # Where arrays are is not known when kernels are chosen, but what the default is.
        with jax.default_device(device):
            moved = jax.device_put(args, device)
            results.append(jax.tree.map(np.asarray, jax.jit(fn)(*moved)))
    return results


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_quantizes_as_the_cpu_does(name, dtype):
    spec = PRESETS[name]
    x = normal((512, 1024), dtype)
    cpu, gpu = on_both(lambda x: quantize(x, spec, key=jax.random.key(0)), x)
    if spec.scale in POWER_OF_TWO_RULES:
        assert_bitwise_equal(gpu, cpu)  # Exact: shifts and multiplications by powers of two.
        return
    # Bound: a float32 division or square root on the GPU may miss the nearest number by one unit.
    # Where rounding is random, the random bits fall between two such results once in 2**18 times.
    scales = [np.asarray(q.scales, np.float32) for q in (gpu, cpu)]
    turned = np.abs(scales[0] - scales[1]) > 2**-22 * np.abs(scales[1])
    assert turned.sum() <= (8 if spec.rounding == "eden" else 0)
    # So an entry may round the other way only where both ways are equally far, to 2**-20.
    x = np.asarray(x, np.float64)
    misses = [
        np.abs(x - np.asarray(dequantize(jax.tree.map(jnp.asarray, q)), np.float64))
        for q in (gpu, cpu)
    ]
    turned = np.abs(misses[0] - misses[1]) > 2**-20 * np.abs(x).max(-1, keepdims=True)
    # Statistical: 2 of 2**19 entries are expected to turn, 20 in less than 1 of 10**12 runs. Under
    # "eden", 8 blocks of 16 (2**15 scales are drawn, 1 in 8 runs turns one of them).
    assert turned.sum() <= {"nearest": 0, "stochastic": 20, "eden": 8 * 16}[spec.rounding]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_hadamard_keeps_float32_precision(dtype):
    cpu, gpu = on_both(Hadamard(128).apply, normal((256, 512), dtype))
    # Bound: 128 float32 sums of terms up to 5 in size, over sqrt(128), in some order.
    np.testing.assert_allclose(gpu, cpu, rtol=0, atol=128 * 2**-24 * 5 * 128**0.5)


def test_fp8_recipe_takes_the_float8_path_and_computes_the_same():
    if (dispatch.cuda_capability() or (0, 0)) < (8, 9):
        pytest.skip("needs FP8 tensor cores")
    x, w = normal((256, 512), jnp.bfloat16), normal((128, 512), seed=1)
    g = normal((256, 128), jnp.bfloat16, seed=2)
    args = jax.device_put((x, w, g), jax.devices("gpu")[0])

    def products(x, w, g, implementation=None):
        dot = functools.partial(
            quantized_dot, recipe=recipes.FP8_TENSORWISE, implementation=implementation
        )
        y, gradients = jax.vjp(dot, x, w)
        return y, *gradients(g)

    paths = {row.product: row.path for row in explain(products, *args).rows}
    assert paths == dict.fromkeys(("y", "dx", "dw"), "fp8")
    run = jax.jit(products, static_argnums=3)
    x, w, g = (np.abs(np.asarray(z, np.float64)) for z in args)
    terms = x @ w.T, g @ w, g.T @ x
    lengths = 512, 128, 256
    for fast, reference, magnitudes, length in zip(
        run(*args, None), run(*args, "dequantize"), terms, lengths, strict=True
    ):
        fast, reference = np.asarray(fast, np.float64), np.asarray(reference, np.float64)
        # Bound: codes are the same, at most 1.25 times as large in magnitude. The tensor core keeps
        # 13 bits of a sum or more, each time that it adds 32 terms. Results are rounded to
        # bfloat16 but for dw, on either side of a tie.
        sums = length / 32 * 2**-13 * 1.25**2 * magnitudes
        assert np.all(np.abs(fast - reference) <= sums + 2**-7 * np.abs(reference))


def test_cudnn_attention_equals_xla():
    q, k, v = (
        normal((2, 256, heads, 128), jnp.bfloat16, seed) for seed, heads in enumerate((4, 2, 2))
    )
    q, k, v = jax.device_put((q, k, v), jax.devices("gpu")[0])

    def gradients(q, k, v, implementation):
        def loss(q, k, v):
            y = attention(q, k, v, implementation=implementation)
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    run = jax.jit(gradients, static_argnums=3)
    (_, fast), fast_grads = run(q, k, v, None)
    (_, slow), slow_grads = run(q, k, v, "xla")
    assert_bitwise_equal(fast, run(q, k, v, "cudnn")[0][1])  # None picks cuDNN here.
    for a, b in zip((fast, *fast_grads), (slow, *slow_grads), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Bound: bfloat16 probabilities and results, a few roundings of 2**-9 in norm.
        assert np.linalg.norm(a - b) <= 4 * 2**-9 * np.linalg.norm(b)


FAMILIES = ("bf16", "fp8_tensorwise", "quest_w4a4", "rtn_w4a4", "mxfp4_forward", "nvfp4_forward")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_of_recipes_trains_as_on_the_cpu(name):
    config = LlamaConfig(
        vocab_size=256,
        d_model=256,
        n_layers=2,
        n_heads=2,
        dtype="float32",  # in bfloat16 roundings flip codes, which moves logits by a tenth
        recipe_rules=llama_rules(recipes.RECIPES[name]),
    )
    model = Llama(config)
    tokens = np.random.default_rng(0).integers(0, 256, (4, 129))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    params = nn.meta.unbox(model.init(jax.random.key(0), inputs)["params"])

    def loss(params, inputs, targets):
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, inputs, targets, method="loss")

    cpu, gpu = on_both(jax.value_and_grad(loss), params, inputs, targets)
    # Bound: of a million quantized entries some tens lie within float32 rounding of a boundary and
    # may flip; a flip moves the logits of one token in 512, 0.3 in size, by a few percent.
    np.testing.assert_allclose(gpu[0], cpu[0], rtol=0, atol=50 * 0.3 * 0.03 / 512)
    norms = [np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(g))) for g in (gpu[1], cpu[1])]
    np.testing.assert_allclose(norms[0], norms[1], rtol=0.01)  # Bound: as above, for one in 512.


def test_fifty_steps_through_the_kernels_lose_what_the_reference_loses(monkeypatch):
    if obstacle := hopper_obstacle(dispatch.cuda_capability()):
        pytest.skip(obstacle)
    rng = np.random.default_rng(0)
    # Text that can be learned: each token has one successor, which follows nine times in ten.
    tokens = rng.integers(0, 512, (50, 16, 513), dtype=np.int32)
    successor = rng.permutation(512)
    for t in range(512):
        is_next = rng.random((50, 16)) < 0.9
        tokens[:, :, t + 1] = np.where(is_next, successor[tokens[:, :, t]], tokens[:, :, t + 1])

    rules = llama_rules(recipes.RECIPES["quartet_rtn"])
    # Without a warm-up Adam's first updates throw the losses about, and chance decides how far.
    learning_rate = optax.schedules.linear_schedule(0.0, 1e-3, 20)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))

    def compiled(implementation):
        """Fifty steps by it, as a function of what the first weights are multiplied by: 1 +- it."""
        model = Llama(
            llama_config("30m", vocab_size=512, recipe_rules=rules, implementation=implementation)
        )
        first = jax.jit(model.init)(jax.random.key(0), tokens[0, :1, :-1])
        step = make_train_step(model, tx, StepPlan(needs_key=True))

        def losses(noise=0.0, seed=0):
            key = jax.random.key(seed)
            params = jax.tree.map(
                lambda w: w * (1 + noise * jax.random.rademacher(key, w.shape, w.dtype)),
                nn.meta.unbox(first)["params"],
            )
            state, found = create_state(params, tx), []
            for batch in tokens:
                state, metrics = step(state, (batch[:, :-1], batch[:, 1:]))
                found.append(metrics.loss)
            return np.asarray(jax.device_get(found), np.float64)

        return losses

    by_reference, by_kernels = compiled("dequantize"), compiled("hopper")
    reference = by_reference()
    # What a last bit of the weights comes to, by codes that turn and by chance.
    chance = np.max([np.abs(by_reference(2**-22, seed) - reference) for seed in range(3)], axis=0)
    exact = by_kernels()
    difference = np.abs(exact - reference)
    assert reference[-1] < reference[0] - 1
    print(f"difference {difference.max():.2e}, of a last bit {chance.max():.2e}", *difference[::7])
    # Statistical: sums in another order, rounded to bfloat16, turn codes as a last bit of the
    # weights does, and what becomes of them is chance; four times as much is allowed.
    allowed = 4 * np.maximum.accumulate(chance) + 2**-8 * 2**-6
    assert np.all(difference <= allowed)
    # Bounds of the tensors that an earlier step has left, with a margin: 16 times the abs-max.
    again = by_kernels()
    monkeypatch.setattr(op, "finite_absmax", lambda x: 16 * finite_absmax(x))
    jax.clear_caches()  # nothing traced before is taken
    loose = compiled("hopper")()
    jax.clear_caches()
    for name, other in {"the same again": again, "loose bounds": loose}.items():
        apart = np.abs(other - exact)
        print(f"{name}: {np.sum(apart == 0)} of 50 losses equal, {apart.max():.2e} at most")
    assert np.all(np.abs(loose - reference) <= allowed)
