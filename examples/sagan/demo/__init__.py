"""The demo: a small SAGAN on handwritten digits."""
