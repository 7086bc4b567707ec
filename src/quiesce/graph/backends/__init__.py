"""Backends: what is quantized where, as data. A new one is a file beside academic.py and a row here."""

from quiesce.graph.backends.academic import ACADEMIC
from quiesce.graph.backends.backend import Backend

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (ACADEMIC,)}
