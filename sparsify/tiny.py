"""Where the model that ships with the package lies."""

from pathlib import Path

TINY_PROSPARSE = Path(__file__).parent / "tiny-prosparse"
"""A FATReLU llama of 6.8M parameters; its README.md is its model card."""
