import jax
import jax.numpy as jnp
import pytest

from lowbit_jax.models import (
    LLAMA_SIZES,
    Llama,
    LlamaConfig,
    count_params,
    flops_per_token,
    llama_config,
)


# Panferov et al., QuEST: millions outside embedding and head, as its tables print them; and
# Llama-3.2-1B with its 128,256 tied embeddings, counted by its checkpoint.
@pytest.mark.parametrize(
    ("size", "printed"),
    [("100m", "102.8M"), ("200m", "203.2M"), ("430m", "443.1M"), ("800m", "822.2M")],
)
def test_published_sizes(size, printed):
    assert f"{count_params(llama_config(size))['non_embedding'] / 1e6:.1f}M" == printed


def test_published_sizes_to_the_last_parameter():
    assert count_params(llama_config("30m"))["non_embedding"] == 30_482_560
    assert count_params(llama_config("50m"))["non_embedding"] == 49_556_736
    llama_1b = llama_config("1b", vocab_size=128_256, tie_embeddings=True)
    assert count_params(llama_1b)["total"] == 1_235_814_400


@pytest.mark.parametrize("tied", [False, True])
def test_counts_what_the_model_has(tied):
    for size in ("30m", "1b"):
        config = llama_config(size, tie_embeddings=tied)
        shapes = jax.eval_shape(
            Llama(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32)
        )
        assert count_params(config)["total"] == sum(x.size for x in jax.tree.leaves(shapes))


def test_the_default_mlp_width_is_that_of_the_table():
    for size, shape in LLAMA_SIZES.items():
        if size != "1b":
            assert llama_config(size, d_ff=None).mlp_width == shape["d_ff"]


def test_every_published_head_is_128_wide():
    assert {llama_config(size).head_dim for size in LLAMA_SIZES if size != "1b"} == {128}


# Schultheis and Alistarh, LLMQ, arXiv:2512.15306: tokens a second of Qwen2.5 shapes at 1024 tokens
# if an H100 (989.4 TFLOP/s) did nothing but multiply, to the printed digits.
@pytest.mark.parametrize(
    ("shape", "tokens_per_s"),
    [
        ((24, 896, 4864, 14, 2, 151_936), 319_585),
        ((28, 1536, 8960, 12, 2, 151_936), 103_867),
        ((28, 3584, 18_944, 28, 4, 152_064), 22_989),
    ],
)
def test_flops_give_the_published_speed_of_light(shape, tokens_per_s):
    names = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "vocab_size")
    flops = flops_per_token(LlamaConfig(**dict(zip(names, shape, strict=True))), 1024)
    # Rounding of the printed number, and of the peak to four digits.
    assert 989.4e12 / flops == pytest.approx(tokens_per_s, rel=1e-4)


def test_flops_of_a_small_shape_counted_by_hand():
    config = LlamaConfig(
        vocab_size=10, d_model=4, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=3, tie_embeddings=True
    )
    # q, o: 16 each; k, v: 8 each; MLP: 3 * 12; head: 40. Attention: 5 tokens, 4 wide.
    assert flops_per_token(config, 5) == 6 * (16 + 16 + 8 + 8 + 36 + 40) + 6 * 4 * 5


def test_an_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match="30m, 50m"):
        llama_config("31m")
