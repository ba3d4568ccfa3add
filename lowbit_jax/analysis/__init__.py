"""Measurements of data and models that no training step needs."""

from lowbit_jax.analysis.text_baselines import Trigram, fit_trigram, text_baselines

__all__ = ["Trigram", "fit_trigram", "text_baselines"]
