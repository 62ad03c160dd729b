"""Processes that stay up for a session and run jobs together, as the ranks of a distributed Trainer.

A process that imports torch, Lightning and transformers costs seconds. Here a server imports them once, and every rank is a
fork of that server. The environment is torchelastic's, so Lightning takes the ranks as they are and starts no processes. The
gloo process group is made once: Lightning and torch's device meshes use a group that is there.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# The server imports these. They must be importable without pytest's ``pythonpath``.
IMPORTED_ONCE = [
    "lightning.pytorch",
    "peft",
    "sparsellm_lightning.distributed",
    "torch.distributed.checkpoint",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
]
GRACE = 20.0  # seconds that the other ranks get to end after one failed


class JobFailed(Exception):
    """A rank raised, died, or took too long.

    Attributes:
        tracebacks: by rank, of the ranks that raised.
    """

    def __init__(self, message: str, tracebacks: dict[int, str]) -> None:
        super().__init__("\n".join([message, *(f"rank {rank}:\n{text}" for rank, text in tracebacks.items())]))
        self.tracebacks = tracebacks


class RankPool:
    """``size`` ranks that run jobs of ``support.jobs``. The processes start on first use, and anew after a failed job.

    A pool of one rank runs jobs in the calling process.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, job: str, folder: Path, timeout: float = 300, **options: Any) -> list[Any]:
        """Run a job on every rank.

        Args:
            job: name of a function in ``support.jobs``.
            folder: of the job's files. It is made if it is missing.
            timeout: seconds.
            options: of the job.

        Returns:
            what the job returned, by rank.

        Raises:
            JobFailed: a rank raised, died, or took too long. The processes are killed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        options["processes"] = self.size
        if self.size == 1:
            from support import jobs

            return [jobs.run(job, folder, options)]
        if not self._processes:
            self._start()
        message = pickle.dumps((job, folder, options))
        for connection in self._connections:
            connection.send_bytes(message)
        return self._collect(job, timeout)

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def _start(self) -> None:
        from torch.distributed import TCPStore

        # This process serves the store, as torchelastic's agent does. So its port is free for certain.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED_ONCE)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def _collect(self, job: str, timeout: float) -> list[Any]:
        """Wait for every rank's answer. After a failure, the others get ``GRACE`` seconds at most."""
        results: dict[int, Any] = {}
        tracebacks: dict[int, str] = {}
        died: list[int] = []
        deadline = time.monotonic() + timeout
        pending = {connection: rank for rank, connection in enumerate(self._connections)}
        while pending and time.monotonic() < deadline:
            for connection in wait(list(pending), max(deadline - time.monotonic(), 0)):
                rank = pending.pop(connection)
                try:
                    succeeded, answer = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    died.append(rank)
                    continue
                (results if succeeded else tracebacks)[rank] = answer
            if died or tracebacks:
                deadline = min(deadline, time.monotonic() + GRACE)
        if len(results) == self.size:
            return [results[rank] for rank in range(self.size)]
        self.close()
        silent = sorted(pending.values())
        raise JobFailed(f"{job}: ranks {died} died, ranks {silent} did not answer in time", tracebacks)


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    """The life of a rank: join the process group, then run jobs until the pool closes the connection."""
    values = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "OMP_NUM_THREADS": 1,
    }
    os.environ.update({name: str(value) for name, value in values.items()})
    import torch
    import torch.distributed as dist

    from support import jobs, mixtures  # noqa: F401  a model class of its own is registered
    from support.quick import constant_speed, without_drawing
    from support.text import tokenised_once

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with tokenised_once(), constant_speed(), without_drawing():
        while True:
            try:
                job, folder, options = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            try:
                answer: tuple[bool, Any] = True, jobs.run(job, folder, options)
            except BaseException:
                # The process ends, as it does in a real run. That wakes ranks that wait for this one.
                connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
                return
            connection.send_bytes(pickle.dumps(answer))
            gc.collect()
