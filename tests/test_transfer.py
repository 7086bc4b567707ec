from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from quiesce.memory import Memory, Rows, Stored
from quiesce.transfer import MOST_WAITING, Ahead, Behind, far

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class TestAhead:
    @pytest.mark.parametrize("threaded", [False, True])
    def test_what_is_asked_for_comes_and_the_next_one_is_read(self, threaded: bool) -> None:
        read: list[int] = []

        def square(number: int) -> int:
            read.append(number)
            return number**2

        threads = threading.active_count()
        with Ahead(square, lambda _: (), CPU, threaded=threaded) as ahead:
            assert ahead.threaded is threaded
            assert ahead.of("2", 2, ("3", 3)) == 4
            ahead.wait()
            assert read == ([2, 3] if threaded else [2])
            assert ahead.of("3", 3, ("4", 4)) == 9
            assert ahead.of("7", 7) == 49  # another one than was expected
            ahead.wait()
        assert read == ([2, 3, 4, 7] if threaded else [2, 3, 7])
        assert threading.active_count() == threads

    @pytest.mark.parametrize("threaded", [False, True])
    def test_an_error_comes_to_who_asks(self, threaded: bool) -> None:
        with Ahead(lambda n: 1 // n, lambda _: (), CPU, threaded=threaded) as ahead:
            assert ahead.of(1, 1, (0, 0)) == 1
            with pytest.raises(ZeroDivisionError):
                ahead.of(0, 0)
            assert ahead.of(1, 1) == 1


def written(memory: Memory, device: torch.device) -> tuple[Rows, Tensor]:
    values = torch.arange(40.0, device=device).view(10, 4)
    rows = memory.room(values, 10)
    with Behind(device) as behind:
        for first in range(10):
            made = values[first : first + 1] + 0.0
            behind.write(rows, slice(first, first + 1), made)
    return rows, values


@pytest.mark.parametrize("memory", [Memory(CPU), Memory(CPU, 0)], ids=["device", "file"])
def test_rows_are_written(memory: Memory) -> None:
    rows, values = written(memory, CPU)
    assert far([rows]) is isinstance(rows, Stored)
    assert torch.equal(rows[:], values)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", [(None, None), (0, None), (0, 0)], ids=["device", "host", "file"])
def test_what_a_gpu_made_is_written_beside_its_work(memory: tuple[int | None, int | None]) -> None:
    rows, values = written(Memory(GPU, *memory), GPU)
    assert torch.equal(rows[:], values)


@pytest.mark.gpu
def test_an_error_of_a_write_is_raised_at_the_end() -> None:
    rows, values = written(Memory(GPU, 0), GPU)
    with pytest.raises(RuntimeError), Behind(GPU) as behind:
        for _ in range(MOST_WAITING):
            behind.write(rows, slice(0, 3), values[:2])
