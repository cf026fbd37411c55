"""Checks of what lies around the software: processes that talk, the disk, shared memory, locks, the Hub."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from cpt.doctor.line import Line, fail, ok, warn

_GIB = 2**30
_RANK = """
import sys; sys.path[:] = {path!r}
from cpt.doctor.system import one_rank
one_rank(int(sys.argv[1]), sys.argv[2], sys.argv[3])
"""


def check_all_reduce(address: str = "127.0.0.1", wait_s: float = 20.0) -> Line:
    """Two processes add up a tensor over gloo, and over NCCL where there are two GPUs."""
    import torch

    backends = ["gloo", *["nccl"] * (torch.cuda.device_count() > 1)]
    said = []
    for backend in backends:
        seconds, problem = _two_ranks(backend, address, wait_s)
        if problem:
            name = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_DEBUG=INFO NCCL_SOCKET_IFNAME"}[backend]
            return fail(f"{backend}: {problem}", f"export {name}=lo, or the interface that `ip addr` shows")
        said.append(f"{backend} {seconds * 1e3:.0f} ms")
    return ok(f"two processes added up 4 MiB: {', '.join(said)}")


def _two_ranks(backend: str, address: str, wait_s: float) -> tuple[float, str | None]:
    """Seconds of one all-reduce of 4 MiB, and what went wrong."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"tcp://{address}:{probe.getsockname()[1]}"
    command = [sys.executable, "-c", _RANK.format(path=sys.path)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), where, backend], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    try:
        printed = [rank.communicate(timeout=wait_s) for rank in ranks]
    except subprocess.TimeoutExpired:
        return 0.0, f"the two processes did not meet at {where} within {wait_s:g} s"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (_, errors) in zip(ranks, printed, strict=True):
        if rank.returncode:
            return 0.0, (errors.strip().splitlines() or ["ended without a word"])[-1][:200]
    return float(printed[0][0].split()[-1]), None


def one_rank(rank: int, where: str, backend: str) -> None:
    """One of the two processes: prints the seconds of one all-reduce. Raises RuntimeError for a wrong sum."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    dist.init_process_group(backend, init_method=where, rank=rank, world_size=2, timeout=timedelta(seconds=10))
    tensor = torch.full((2**20,), rank + 1.0, device=device)
    dist.all_reduce(tensor)
    if not bool((tensor == 3.0).all()):
        raise RuntimeError(f"the sum of 1 and 2 over two processes is {tensor[0].item()}")
    began = time.perf_counter()
    dist.all_reduce(tensor)
    tensor.sum().item()  # waits for the device
    print(time.perf_counter() - began, flush=True)
    dist.destroy_process_group()
    os._exit(0)  # a thread of gloo may abort a normal exit


def check_disk(folder: Path, scratch: Path, mib: int = 32) -> Line:
    """A file written, flushed to the disk and read back where runs go; the space that is left."""
    scratch.mkdir(parents=True, exist_ok=True)
    content = os.urandom(2**20) * mib
    file = scratch / "written"
    began = time.perf_counter()
    with open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    speed = mib / (time.perf_counter() - began)
    if file.read_bytes() != content:
        return fail(f"{folder}: reads other bytes than were written", "give another disk: output_dir=FOLDER")
    file.unlink()
    free = shutil.disk_usage(folder).free
    said = f"{free / _GIB:.1f} GiB free, {speed:.0f} MiB/s written to the disk and read back ({folder})"
    if free < 5 * _GIB:
        return warn(said, "free some space, or give another disk: output_dir=FOLDER")
    return ok(said)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Line:
    """A block of 8 MiB shared between processes; how much there may be (NCCL and data loaders use it)."""
    block = SharedMemory(create=True, size=2**23)
    other = SharedMemory(name=block.name)
    try:
        assert block.buf is not None
        assert other.buf is not None
        block.buf[-1] = 7
        arrived = other.buf[-1] == 7
    finally:
        other.close()
        block.close()
        block.unlink()
    if not arrived:
        return fail("a shared block does not hold what was written", "docker run --shm-size=8g")
    if not folder.is_dir():
        return ok("a block of 8 MiB was shared")
    size = shutil.disk_usage(folder)
    said = f"{size.free / _GIB:.2f} of {size.total / _GIB:.2f} GiB free in {folder}"
    if size.free < _GIB:
        return warn(f"{said}: NCCL and data loaders of several processes need more", "docker run --shm-size=8g")
    return ok(said)


_SECOND = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def check_locks(folder: Path, scratch: Path) -> Line:
    """A lock held here is refused to another process: it keeps two of them out of one run."""
    scratch.mkdir(parents=True, exist_ok=True)
    file = scratch / ".lock"
    with open(file, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = subprocess.run([sys.executable, "-c", _SECOND, str(file)], capture_output=True, check=False)
    if second.returncode == 0:
        found = f"{folder}: two processes held one lock, so two runs could write over each other"
        return fail(found, "give a disk with locks: output_dir=FOLDER (NFS: mount it without nolock)")
    return ok("a lock held by one process is refused to another")


def check_hub() -> Line:
    """A question to the Hub through its own client, or why none is asked."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return ok("HF_HUB_OFFLINE is set: names on the Hub are taken from the local cache")
    began = time.perf_counter()
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=4)
    except Exception as error:  # every HTTP library has its own for: no network
        found = f"{constants.ENDPOINT} does not answer ({type(error).__name__})"
        return warn(found, "export HTTPS_PROXY=URL, or HF_HUB_OFFLINE=1 and folders instead of names")
    took = time.perf_counter() - began
    if answer.status_code >= 500:
        return warn(f"{constants.ENDPOINT} answers {answer.status_code}", "wait, or export HF_HUB_OFFLINE=1")
    return ok(f"{constants.ENDPOINT} answered in {took * 1e3:.0f} ms")
