"""diffad_lite: diffusion-based image anomaly detection, small enough to read."""

__version__ = "0.1.0"
