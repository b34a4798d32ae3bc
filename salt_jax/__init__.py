"""salt_jax: few-step distillation of video diffusion models in JAX."""

__version__ = '0.1.0'
