"""Several processes that share the work on one network: each has a part of the images, all end with the same state.

They meet in collective operations of ``torch.distributed``: gloo for tensors on the CPU, NCCL on GPUs. What one process
calls, all must call, in the same order. Alone, a process talks to nobody, and each operation gives back what it got.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quiesce.errors import ClusterError, DataError

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""
_SEEDS_APART = 0x9E3779B1
"""2^32 / φ, odd: of a seed, torch's generator takes the low 32 bits."""


@dataclass(frozen=True)
class Processes:
    """This process, number ``rank`` of ``size`` ones."""

    rank: int = 0
    size: int = 1
    beside: int = 1
    """How many of them are on this machine, this one included."""

    @classmethod
    def current(cls) -> Processes:
        """Return those of ``torch.distributed``'s process group, or this process alone if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        size = dist.get_world_size()
        return cls(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    @property
    def first(self) -> bool:
        """True for the process that writes and shows."""
        return self.rank == 0

    def share(self, images: int, together: int = 1) -> slice:
        """Return this process's part of ``images`` images, of which ``together`` neighbours stay together.

        Parts follow one another in the order of ranks, and differ by ``together`` images at most.
        """
        clips = images // together
        return slice(self.rank * clips // self.size * together, (self.rank + 1) * clips // self.size * together)

    def part(self, what: str, images: int, together: int = 1) -> int:
        """Return the length of :meth:`share`.

        Raises:
            DataError: there is not one for each process; ``what`` names them.
        """
        if images < self.size * together:
            raise DataError(
                f"{what}: {images}, fewer than {self.size} processes can share; give more, or start fewer processes."
            )
        mine = self.share(images, together)
        return int(mine.stop - mine.start)

    def seed(self, seed: int) -> int:
        """Return a seed of this process's own; the first one keeps ``seed``."""
        return (seed + self.rank * _SEEDS_APART) % 2**63

    def place(self, count: int) -> tuple[int, int]:
        """Return how many things the processes in front of this one have, and all together; this one has ``count``."""
        counts: list[int] = self.gather(torch.tensor([count])).tolist()
        return sum(counts[: self.rank]), sum(counts)

    @torch.no_grad()
    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace ``tensors`` by their means over all processes, with one message for all that have one dtype."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            group = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in group])
            with self._connected():
                dist.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(group, torch.split(flat, [t.numel() for t in group]), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of ``values`` over all processes, the same bits on each."""
        if self.size == 1:
            return values
        total = values.clone()
        with self._connected():
            dist.all_reduce(total)
        return total

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of ranks; each has as many as it has, of one form."""
        if self.size == 1:
            return rows
        with self._connected():
            count = torch.tensor([len(rows)], device=rows.device)
            counts = [torch.empty_like(count) for _ in range(self.size)]
            dist.all_gather(counts, count)
            lengths = [int(c) for c in counts]
            padded = rows.new_zeros(max(lengths), *rows.shape[1:])
            padded[: len(rows)] = rows
            found = [torch.empty_like(padded) for _ in lengths]
            dist.all_gather(found, padded)
        return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])

    def texts(self, text: str) -> list[str]:
        """Return the texts of all processes, in the order of ranks."""
        if self.size == 1:
            return [text]
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0).byte()
        lengths = self.gather(torch.tensor([len(content)])).tolist()
        parts = torch.split(self.gather(content), lengths)
        return [bytes(part.tolist()).decode() for part in parts]

    def from_first(self, value: Any) -> Any:
        """Return the first process's ``value``, plain data as JSON can hold."""
        return value if self.size == 1 else json.loads(self.texts(json.dumps(value) if self.first else "")[0])

    @torch.no_grad()
    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace ``tensors`` by those of the first process."""
        if self.size == 1:
            return
        for tensor in tensors:
            content = tensor.contiguous()
            with self._connected():
                dist.broadcast(content, 0)
            tensor.copy_(content)

    def check_alike(self, digests: Mapping[str, str]) -> None:
        """Check that all processes have the same ``digests``, each under the name of what it is of.

        Raises:
            ClusterError: they have not; the message names the first that differs, and where.
        """
        for rank, text in enumerate(self.texts(json.dumps(digests)) if self.size > 1 else []):
            theirs = json.loads(text)
            different = [name for name in digests | theirs if digests.get(name) != theirs.get(name)]
            if different:
                raise ClusterError(
                    f"{different[0]} is another one in process {rank} than in process {self.rank}; start all with the "
                    "same command and files, on machines of one kind with the same versions."
                )

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's; NCCL's are of a subclass
            reason = str(error).partition("\n")[0]
            raise ClusterError(
                f"process {self.rank} lost the others ({reason}); see what they say, and begin again."
            ) from error


ALONE = Processes()
"""One process that does all."""


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Within the block, be one of the processes that ``torchrun`` started, working on ``device``; alone, if it did not.

    Raises:
        ClusterError: the others can't be reached.
    """
    if not started_by_torchrun():
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ClusterError(
            f"the processes can't be brought together ({reason}); start all of them by torchrun."
        ) from error
    yield Processes.current()
    # Not when something went wrong: to take leave would be to wait for processes that are gone.
    dist.destroy_process_group()
