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
    # Qwen2.5-0.5B by its checkpoint.
    assert count_params(llama_config("qwen2.5-0.5b"))["total"] == 494_032_768
    llama_1b = llama_config("1b", vocab_size=128_256, tie_embeddings=True)
    assert count_params(llama_1b)["total"] == 1_235_814_400


@pytest.mark.parametrize("tied", [False, True])
def test_counts_what_the_model_has(tied):
    for size in ("30m", "1b", "qwen2.5-0.5b"):
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


def test_flops_of_a_small_shape_counted_by_hand():
    config = LlamaConfig(
        vocab_size=10, d_model=4, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=3, tie_embeddings=True
    )
    # q, o: 16 each; k, v: 8 each; MLP: 3 * 12; head: 40. Attention: 5 tokens, 4 wide.
    assert flops_per_token(config, 5) == 6 * (16 + 16 + 8 + 8 + 36 + 40) + 6 * 4 * 5


def test_an_unknown_size_lists_the_known():
    with pytest.raises(ValueError, match="30m, 50m"):
        llama_config("31m")
