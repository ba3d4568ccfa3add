"""Block by block: every block is solved for what the compressed ones before it give."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lowbit_jax.models import Llama, LlamaConfig, llama_rules
from lowbit_jax.numerics.presets import INT4
from lowbit_jax.ops.dot_recipe import DotRecipe
from lowbit_jax.ops.recipes import get_recipe
from lowbit_jax.ptq import calibrate
from lowbit_jax.ptq.calibrate import Compression, compress_blocks, over_devices
from lowbit_jax.ptq.hessian import add_inputs, empty_hessian
from lowbit_jax.ptq.info import Info

WIDTH, LAYERS = 32, 3
MODEL = Llama(LlamaConfig(48, WIDTH, LAYERS, 4, n_kv_heads=2, d_ff=64, dtype="float32"))
RNG = np.random.default_rng(0)
BATCHES = [RNG.integers(0, 48, (2, 12), np.int32) for _ in range(2)]
SETTINGS = {"method": "as it is"}
INFO = Info(np.float32(0), np.float32(0), np.int32(0))
MATRICES = {
    "attention_norm": ("attention/q_proj", "attention/k_proj", "attention/v_proj"),
    "attention/o_proj": ("attention/o_proj",),
    "mlp_norm": ("mlp/gate_proj", "mlp/up_proj"),
    "mlp/down_proj": ("mlp/down_proj",),
}


@pytest.fixture(scope="module")
def params():
    init = jax.jit(MODEL.init)(jax.random.key(0), BATCHES[0])["params"]
    return jax.tree.map(lambda x: 10 * np.asarray(x), nn.meta.unbox(init))


class Recorder:
    """A method that keeps matrices as they are, but those of one block as zeros."""

    def __init__(self, zero_block=None):
        self.seen, self.zero_block = [], zero_block

    def solve(self, path, weight, hessian):
        if not isinstance(weight, jax.core.Tracer):
            self.seen.append((path, hessian))
        is_zero = self.zero_block is not None and len(self.seen) <= 7 * (self.zero_block + 1)
        return (0 * weight if is_zero else weight), INFO

    @property
    def compression(self):
        return Compression(self.solve, lambda path, kept: kept)


def hessians_of_model(model, params):
    """From one pass over the whole model: the Hessians of the inputs of all matrices."""
    unrolled = Llama(dataclasses.replace(model.config, scan_unroll=1))

    def one(batch):
        captured = {}
        x, rotary = unrolled.apply({"params": params}, batch, method="first_block")
        for index in range(LAYERS):
            layer = jax.tree.map(lambda leaf, i=index: leaf[i], params["layers"])
            x = block_by_hand(model.config, layer, x, rotary, index, captured)
        return captured

    found = {}
    params = jax.tree.map(jnp.asarray, params)
    for batch in BATCHES:
        for name, rows in one(batch).items():
            found[name] = add_inputs(found.get(name, empty_hessian(rows.shape[-1])), rows)
    return found


def block_by_hand(config, layer, x, rotary, index, captured):
    """A Llama block in plain functions, as its paper has it; notes what the matrices take."""

    def norm(z, scale):
        return z / jnp.sqrt(jnp.mean(z**2, -1, keepdims=True) + config.norm_eps) * scale

    def turned(z):  # halves of a head are the two parts of complex numbers
        cos, sin = (angle[None, :, None, :] for angle in rotary)
        a, b = jnp.split(z, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    b, t, d = x.shape
    heads, kv, width = config.n_heads, config.kv_heads, config.head_dim
    matrices = {n: w["weight"] for part in ("attention", "mlp") for n, w in layer[part].items()}
    h = norm(x, layer["attention_norm"]["scale"])
    captured[index, "attention_norm"] = h
    q, k, v = (
        (h @ matrices[f"{name}_proj"].T).reshape(b, t, count, width)
        for name, count in (("q", heads), ("k", kv), ("v", kv))
    )
    q, k = turned(q), jnp.repeat(turned(k), heads // kv, 2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), jnp.repeat(v, heads // kv, 2))
    y = y.reshape(b, t, d)
    captured[index, "attention/o_proj"] = y
    x = x + y @ matrices["o_proj"].T
    h = norm(x, layer["mlp_norm"]["scale"])
    captured[index, "mlp_norm"] = h
    y = jax.nn.silu(h @ matrices["gate_proj"].T) * (h @ matrices["up_proj"].T)
    captured[index, "mlp/down_proj"] = y
    return x + y @ matrices["down_proj"].T


def zeroed(params, index):
    def zero(path, leaf):
        is_matrix = jax.tree_util.keystr(path).endswith("['weight']")
        return (
            np.concatenate([leaf[:index], 0 * leaf[index : index + 1], leaf[index + 1 :]])
            if (is_matrix)
            else leaf
        )

    layers = jax.tree_util.tree_map_with_path(zero, params["layers"])
    return {**params, "layers": layers}


@pytest.mark.parametrize("zero_block", [None, 0])
def test_hessians_are_those_of_inputs_from_the_compressed_blocks_before(params, zero_block):
    recorder = Recorder(zero_block)
    blocks = list(compress_blocks(MODEL, params, BATCHES, recorder.compression))
    assert len(blocks) == LAYERS
    assert len(recorder.seen) == 7 * LAYERS
    before = hessians_of_model(MODEL, params)
    after = before if zero_block is None else hessians_of_model(MODEL, zeroed(params, zero_block))
    for number, (path, hessian) in enumerate(recorder.seen):
        index = number // 7
        source = next(name for name, users in MATRICES.items() if path in users)
        expected = (before if zero_block in (None, index) else after)[index, source]
        assert hessian.count == 2 * 2 * 12
        # Bound: float32 sums of at most 64 terms in another order, through three blocks; relative
        # to the largest entry, 2**-24 times a few thousand.
        scale = np.abs(expected.matrix).max()
        chex.assert_trees_all_close(hessian.matrix, expected.matrix, rtol=0, atol=1e-4 * scale)


def test_a_killed_run_goes_on_with_the_same_bits_and_solves_nothing_twice(params, tmp_path):
    def shrink(path, weight, hessian):
        if not isinstance(weight, jax.core.Tracer):
            calls.append(path)
        kept = {"half": (weight / 2).astype(jnp.bfloat16), "trace": jnp.trace(hessian.matrix)}
        return kept, INFO

    calls = []
    method = Compression(shrink, lambda path, kept: 2 * jnp.asarray(kept["half"], jnp.float32))
    whole = list(compress_blocks(MODEL, params, BATCHES, method))
    stopped = compress_blocks(MODEL, params, BATCHES, method, folder=tmp_path, settings=SETTINGS)
    first = next(stopped)
    stopped.close()  # as a kill would leave it: one block is there
    assert [path.name for path in sorted(tmp_path.glob("*.npz"))] == ["block_000.npz"]
    calls.clear()
    again = list(
        compress_blocks(MODEL, params, BATCHES, method, folder=tmp_path, settings=SETTINGS)
    )
    assert len(calls) == 7 * (LAYERS - 1)
    chex.assert_trees_all_equal([b.kept for b in again], [b.kept for b in whole])
    assert again[0].reports == first.reports
    assert again[0].kept["mlp/up_proj"]["half"].dtype == jnp.bfloat16


def test_a_folder_of_other_settings_or_a_damaged_file_is_refused(params, tmp_path):
    def run(settings):
        method = Recorder().compression
        return list(
            compress_blocks(MODEL, params, BATCHES, method, folder=tmp_path, settings=settings)
        )

    run(SETTINGS)
    with pytest.raises(ValueError, match="method = 'as it is' where it is 'other' now"):
        run({"method": "other"})
    others = [BATCHES[0], BATCHES[0]]
    method = Recorder().compression
    with pytest.raises(ValueError, match="tokens_sha256"):
        next(compress_blocks(MODEL, params, others, method, folder=tmp_path, settings=SETTINGS))
    changed = {**params, "final_norm": {"scale": 2 * params["final_norm"]["scale"]}}
    with pytest.raises(ValueError, match="params_sha256"):
        next(compress_blocks(MODEL, changed, BATCHES, method, folder=tmp_path, settings=SETTINGS))
    # The same tokens in windows of another length.
    longer = [np.concatenate(BATCHES).reshape(1, 2, 24)[0]]
    with pytest.raises(ValueError, match="tokens_sha256"):
        next(compress_blocks(MODEL, params, longer, method, folder=tmp_path, settings=SETTINGS))
    for name in ("embedding", "layers"):  # first row of the embedding; first layer
        changed = jax.tree.map(np.copy, params)
        for leaf in jax.tree.leaves(changed[name]):
            leaf[0] += 1
        match = "params_sha256" if name == "embedding" else "block 0 .* of other parameters"
        with pytest.raises(ValueError, match=match):
            next(compress_blocks(MODEL, changed, BATCHES, method, folder=tmp_path,
                                 settings=SETTINGS))  # fmt: skip
    file = tmp_path / "block_001.npz"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"block_001.npz cannot be read .* delete it"):
        run(SETTINGS)
    file.unlink()
    assert len(run(SETTINGS)) == LAYERS
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        next(compress_blocks(MODEL, params, BATCHES, Recorder().compression, folder=other))


def test_what_cannot_be_calibrated_is_refused(params):
    method = Recorder().compression
    with pytest.raises(ValueError, match="of one shape"):
        next(compress_blocks(MODEL, params, [], method))
    with pytest.raises(ValueError, match="of one shape"):
        next(compress_blocks(MODEL, params, [BATCHES[0], BATCHES[0][:, :5]], method))
    for wrong in (BATCHES[0] + 48, BATCHES[0] - 48, BATCHES[0].astype(np.float32)):
        with pytest.raises(ValueError, match="tokens must be integers from 0 to 47"):
            next(compress_blocks(MODEL, params, [wrong], method))
    rules = llama_rules(get_recipe("quartet"))
    random = Llama(dataclasses.replace(MODEL.config, recipe_rules=rules))
    with pytest.raises(ValueError, match="must not need a key"):
        next(compress_blocks(random, params, BATCHES, method))
    failed = Compression(
        lambda path, w, h: (w, Info(np.float32(np.nan), np.float32(1), np.int32(5))),
        lambda path, kept: kept,
    )
    with pytest.raises(ValueError, match="layer 0, attention/q_proj: a solved layer has a finite"):
        next(compress_blocks(MODEL, params, BATCHES, failed))


def test_later_blocks_are_solved_for_quantized_activations(params):
    recipe = DotRecipe(y_x=dataclasses.replace(INT4, block_size=32))
    model = Llama(dataclasses.replace(MODEL.config, recipe_rules=llama_rules(recipe)))
    plain, quantized = Recorder(), Recorder()
    list(compress_blocks(MODEL, params, BATCHES, plain.compression))
    list(compress_blocks(model, params, BATCHES, quantized.compression))
    of_first = [h for path, h in plain.seen[:1]]
    chex.assert_trees_all_equal(of_first, [h for path, h in quantized.seen[:1]])
    difference = [
        np.abs(a.matrix - b.matrix).max() / np.abs(a.matrix).max()
        for (_, a), (_, b) in zip(plain.seen[7:], quantized.seen[7:], strict=True)
    ]
    assert min(difference) > 1e-3


def test_hessians_sum_over_the_rows_of_all_devices(params):
    devices = jax.devices()[:2]
    place = over_devices(len(BATCHES[0]), devices)
    assert place(np.zeros((4, 2))).devices() == set(devices)
    assert over_devices(3, devices) is jnp.asarray
    alone, cut = Recorder(), Recorder()
    list(compress_blocks(MODEL, params, BATCHES, alone.compression))
    list(compress_blocks(MODEL, params, BATCHES, cut.compression, place=place))
    for (_, a), (_, b) in zip(alone.seen, cut.seen, strict=True):
        assert a.count == b.count
        # Bound: as above.
        scale = np.abs(a.matrix).max()
        chex.assert_trees_all_close(a.matrix, b.matrix, rtol=0, atol=1e-4 * scale)


def test_nothing_of_a_block_stays_on_the_device(params):
    shapes = {(WIDTH, WIDTH), (64, 64), (64, WIDTH), (WIDTH, 64)}  # Hessians and matrices

    def alive():
        return sum(x.shape in shapes for x in jax.live_arrays())

    host = jax.tree.map(np.array, params)
    halves = {"k_proj": (WIDTH // 2, WIDTH), "v_proj": (WIDTH // 2, WIDTH)}
    others = {"gate_proj": (64, WIDTH), "up_proj": (64, WIDTH), "down_proj": (WIDTH, 64)}

    def weight(path, kept):
        return jnp.zeros((halves | others).get(path.split("/")[1], (WIDTH, WIDTH)))

    # On a CPU arrays of the host are views of those of the device: next to nothing is kept here.
    keeps = Compression(lambda path, w, h: (w[:1, :1], INFO), weight)
    before = alive()
    for _ in compress_blocks(MODEL, host, BATCHES, keeps):
        assert alive() == before


def test_a_second_method_compiles_no_block_anew(params):
    list(compress_blocks(MODEL, params, BATCHES, Recorder().compression))
    sizes = [f._cache_size() for f in (calibrate._embed, calibrate._record, calibrate._run)]
    again = Llama(dataclasses.replace(MODEL.config))
    list(compress_blocks(again, params, BATCHES, Recorder().compression))
    assert sizes == [f._cache_size() for f in (calibrate._embed, calibrate._record, calibrate._run)]
