"""Train CLIP models with OpenCLIP's command line and online sample selection."""

__version__ = "0.2.0"
