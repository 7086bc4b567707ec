"""The embedded demo: a small trained network and its images. Trained and written by ``benchmarks/train_demo.py``."""

from quiesce.demo.assets import load_images, load_network, normalize, preprocessing
from quiesce.demo.network import DemoNet

__all__ = ["DemoNet", "load_images", "load_network", "normalize", "preprocessing"]
