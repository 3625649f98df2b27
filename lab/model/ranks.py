"""The processes that run a model together: how the command starts them, how they find each other, and what
they pass to each other outside of kernels.

`start` runs the same command once for each rank and watches: when one ends with an error the others are
stopped, and its error is the command's. In each of these processes `join` returns the `Group`.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch

from lab.arena import map_file, resize
from lab.errors import LabError, one_line
from lab.ops.exchange import Exchange, new_inbox, patience

ROOT = Path(__file__).resolve().parents[2]
RANK, RANKS, FOLDER = "LAB_RANK", "LAB_RANKS", "LAB_RANKS_FOLDER"  # the environment of a rank's process
QUIET = {  # gloo stays on this machine; multicast over NVLink is off on hosts that several users share
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
MEET_SECONDS = 120.0  # in which all ranks must have read their command and opened the model
END_SECONDS = 60.0  # between the ends of two ranks: what rank 0 has to write alone takes less
LOOK_SECONDS = 0.05


def start(command: list[str], ranks: int, given: bytes = b"") -> int:
    """Runs `command` once for each rank and waits. given: the standard input of each.

    Rank 0 has this process's standard output. Returns 0 when all have succeeded; otherwise the remaining ones
    are ended, and LabError is raised with the error of the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="lab-ranks-") as folder:
        errors = [Path(folder, f"errors-{rank}") for rank in range(ranks)]
        Path(folder, "given").write_bytes(given)
        processes = [_process(command, rank, ranks, folder, errors[rank]) for rank in range(ranks)]
        try:
            failed = _watch(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
            for process in processes:
                process.wait()
        texts = [path.read_text(errors="replace") for path in errors]
    if failed is None:
        print(texts[0], end="", file=sys.stderr, flush=True)
        return 0
    raise LabError(_why(failed, processes[failed].returncode, texts[failed]))


def _process(command, rank: int, ranks: int, folder: str, errors: Path) -> subprocess.Popen:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**QUIET, **os.environ, "PYTHONPATH": path}
    environment |= {RANK: str(rank), RANKS: str(ranks), FOLDER: folder}
    with open(Path(folder, "given"), "rb") as given, errors.open("wb") as said:
        return subprocess.Popen(
            command,
            stdin=given,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=said,
            env=environment,
        )


def _watch(processes: list[subprocess.Popen]) -> int | None:
    """The rank that failed first, or None when all have succeeded. Raises LabError where a rank has ended
    without an error, and another goes on as if it were there."""
    ended = None  # since when a rank has
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:
            # One that was ended by a signal is the cause of what others say about it.
            return min(failed, key=lambda rank: (codes[rank] > 0, codes[rank] != 2, rank))
        if None not in codes:
            return None
        running = [str(rank) for rank, code in enumerate(codes) if code is None]
        if len(running) < len(codes):
            ended = ended or time.monotonic()
            if time.monotonic() - ended > END_SECONDS:
                raise LabError(
                    f"rank {codes.index(0)} has ended, and rank {' and '.join(running)} still ran after "
                    f"{END_SECONDS:g} s"
                )
        time.sleep(LOOK_SECONDS)


def _why(rank: int, code: int, text: str) -> str:
    if code < 0:
        first = next((one_line(line) for line in text.splitlines() if "rror" in line), "")
        why = f" ({first})" if first else ""
        return f"rank {rank} was ended by {signal.Signals(-code).name}{why}; the other ranks were stopped"
    # An exception's own line is not indented; what follows it says more, as the block and thread of a kernel.
    # Once ranks are connected torch.distributed writes "[rank0]: " before each.
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in text.splitlines()]
    lines = [line for line in lines if line.strip() and not line[0].isspace()]
    said = one_line(lines[-1]) if lines else f"it ended with status {code}"
    if code == 2:
        said = said.removeprefix("lab: error: ")
        return said if rank == 0 else f"rank {rank}: {said}"
    return f"rank {rank}: {said}"


def check_devices(device: str, ranks: int) -> None:
    """Raises LabError unless each rank can have a GPU of its own that reaches the memory of the others."""
    if device != "cuda":
        return
    count = torch.cuda.device_count()
    if count < ranks:
        raise LabError(f"--tensor-parallel {ranks} needs as many GPUs, and this machine has {count}")
    for one in range(ranks):
        for other in range(ranks):
            if one != other and not torch.cuda.can_device_access_peer(one, other):
                raise LabError(
                    f"GPU {one} cannot reach the memory of GPU {other} (no peer access): see "
                    "`nvidia-smi topo -p2p r`"
                )


class Group:
    """The ranks of a model, seen from one of them.

    sum(t) is for the few steps that are not kernels of the lab: prefill. exchange(words) is what the ops
    take.
    """

    def __init__(self, rank: int, ranks: int, folder: Path, device: str):
        self.rank, self.ranks, self.folder = rank, ranks, folder
        self.device = torch.device(device)
        self.store = torch.distributed.FileStore(str(folder / "store"), ranks)
        self.kept, self.exchanges = [], 0

    def meet(self, what: str, said: str) -> list[str]:
        """What each rank says. Raises LabError with the ranks that have said nothing in time."""
        seconds = patience(MEET_SECONDS)
        self.store.set(f"{what}/{self.rank}", said)
        end, found = time.monotonic() + seconds, {}
        for rank in range(self.ranks):
            left = max(end - time.monotonic(), 0.01)
            try:
                self.store.wait([f"{what}/{rank}"], timedelta(seconds=left))
                found[rank] = self.store.get(f"{what}/{rank}").decode()
            except RuntimeError:
                continue
        missing = [str(rank) for rank in range(self.ranks) if rank not in found]
        if missing:
            raise LabError(
                f"rank {' and '.join(missing)} did not come within {seconds:g} s ({what}); is it still "
                "running?"
            )
        return list(found.values())

    def agree(self, what: str, said: str) -> None:
        """Raises LabError where another rank says something else than rank 0."""
        each = self.meet(what, said)
        for rank, one in enumerate(each):
            if one != each[0]:
                raise LabError(f"rank {rank} has another {what} than rank 0: {one}, not {each[0]}")

    def connect(self) -> None:
        """Opens the connections of torch.distributed; all ranks must be there."""
        torch.distributed.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=torch.distributed.PrefixStore("connections", self.store),
            rank=self.rank,
            world_size=self.ranks,
            timeout=timedelta(seconds=patience(MEET_SECONDS)),
            device_id=self.device if self.device.type == "cuda" else None,
        )

    def sum(self, t: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, in place."""
        torch.distributed.all_reduce(t)
        return t

    def exchange(self, words: int) -> Exchange:
        """Memory through which kernels pass up to `words` words to every other rank at once."""
        words += words % 2
        world = torch.distributed.group.WORLD
        if self.device.type == "cuda":
            import torch.distributed._symmetric_memory as symmetric

            shape = (2, self.ranks, words)
            own = symmetric.empty(shape, dtype=torch.int64, device=self.device)
            memory = symmetric.rendezvous(own, world.group_name)
            own.zero_()
            torch.cuda.synchronize(self.device)
            torch.distributed.barrier()  # no rank may send before all inboxes are zero
            inboxes = [memory.get_buffer(rank, shape, torch.int64) for rank in range(self.ranks)]
            self.kept += [own, memory]
        else:
            self.exchanges += 1
            nbytes = new_inbox(self.ranks, words, "meta").nbytes
            with open(self.folder / f"inboxes-{self.exchanges}", "a+b") as file:
                resize(file, self.ranks * nbytes)  # zeros, whichever rank comes first
                memory = map_file(file, self.ranks * nbytes)
            inboxes = [part.view(torch.int64).view(2, self.ranks, words) for part in memory.split(nbytes)]
        return Exchange.of(self.rank, tuple(inboxes), self.ranks, world)

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def take_gpu(device: str) -> None:
    """Makes a rank's GPU the current one; nothing in a process that is no rank. Before ops are chosen, which
    are bound to the current GPU."""
    rank = os.environ.get(RANK, "")
    if device == "cuda" and rank.isdecimal() and int(rank) < torch.cuda.device_count():
        torch.cuda.set_device(int(rank))


def join(device: str) -> Group | None:
    """The group of this process, or None where it is no rank. A rank's GPU becomes the current one."""
    if RANK not in os.environ:
        return None
    given = {name: os.environ.get(name, "") for name in (RANK, RANKS, FOLDER)}
    if not (given[RANK].isdecimal() and given[RANKS].isdecimal() and Path(given[FOLDER]).is_dir()):
        raise LabError(
            f"{' '.join(f'{name}={value}' for name, value in given.items())} is no place of a rank: "
            "--tensor-parallel sets these variables; unset them"
        )
    rank, ranks = int(given[RANK]), int(given[RANKS])
    if rank >= ranks:
        raise LabError(f"{RANK}={rank}: there are {ranks} ranks, from 0 on")
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives the command
    if device == "cuda":
        take_gpu(device)
        device = f"cuda:{rank}"
    return Group(rank, ranks, Path(given[FOLDER]), device)
