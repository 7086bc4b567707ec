from __future__ import annotations

import ctypes
import sys

import pytest

from quiesce.cli.terminal import stdout_to_stderr


def test_what_libraries_print_in_c_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with stdout_to_stderr():
        ctypes.CDLL(None).printf(b"repairing\n")
    sys.stdout.write("table\n")
    assert capfd.readouterr() == ("table\n", "repairing\n")
