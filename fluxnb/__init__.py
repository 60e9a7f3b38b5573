"""fluxnb: a reproducible study of how to make FLUX text-to-image inference fast."""

__version__ = "0.1.0"
