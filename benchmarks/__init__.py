"""Measures the ops of tk_jax beside every rival that is installed."""
