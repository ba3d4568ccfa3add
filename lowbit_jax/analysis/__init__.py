"""Measurements of data and models that no training step needs."""

from lowbit_jax.analysis.kernel_times import KernelTime, kernel_times, operation_names
from lowbit_jax.analysis.speed_of_light import SpeedOfLight, speed_of_light
from lowbit_jax.analysis.text_baselines import Trigram, fit_trigram, text_baselines

__all__ = [
    "KernelTime",
    "SpeedOfLight",
    "Trigram",
    "fit_trigram",
    "kernel_times",
    "operation_names",
    "speed_of_light",
    "text_baselines",
]
