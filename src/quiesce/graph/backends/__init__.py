"""Backends: what is quantized where, as data. A new one is a file beside academic.py and a row here."""

from quiesce.graph.backends.academic import ACADEMIC
from quiesce.graph.backends.backend import Backend
from quiesce.graph.backends.onnxruntime import ONNXRUNTIME
from quiesce.graph.backends.openvino import OPENVINO
from quiesce.graph.backends.tensorrt import TENSORRT

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (ACADEMIC, ONNXRUNTIME, OPENVINO, TENSORRT)}
