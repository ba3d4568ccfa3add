import statistics

from lowbit_jax.analysis.kernel_times import KernelTime
from lowbit_jax.train.config import load_config_file
from lowbit_jax.train.profile import StepProfile, profile_step


def test_the_step_of_a_config_is_timed():
    config = load_config_file("configs/llama_tiny_quest_cage.py").get_config(
        recipe="bf16", n_layers=1, steps=10, batch_size=2, seq_len=16, cage_total_strength=0.0
    )
    profile = profile_step(config, steps=10, traced_steps=1)
    assert profile.tokens == 32
    assert len(profile.step_times_s) == 2
    assert profile.kernels == ()  # The CPU has no kernels to list.
    assert f"{32e-3 / statistics.median(profile.step_times_s):.1f} ktok/s" in str(profile)


def test_the_table_adds_up():
    kernels = (KernelTime("mlp/dot", 1500.0, 2), KernelTime("loss", 500.0, 1))
    profile = StepProfile("GPU", 4096, 1.0, (0.002, 0.004, 0.003), 2**30, 0.5, kernels)
    text = str(profile)
    assert "1365.3 ktok/s, MFU 50.0%" in text
    assert "3.00 ms (2.00 to 4.00)" in text
    assert "2.00 ms in kernels" in text
