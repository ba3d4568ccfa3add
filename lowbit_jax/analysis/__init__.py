"""Measurements of data and models that no training step needs."""

from lowbit_jax.analysis.kernel_times import KernelTime, kernel_times, operation_names
from lowbit_jax.analysis.text_baselines import Trigram, fit_trigram, text_baselines

__all__ = [
    "KernelTime",
    "Trigram",
    "fit_trigram",
    "kernel_times",
    "operation_names",
    "text_baselines",
]
