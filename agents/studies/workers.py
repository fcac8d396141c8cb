"""Independent pieces of work, side by side: processes of this machine, or a Ray cluster's.

A result is the same wherever it is made: each piece carries its own seed.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from executor.child import end_with_parent
from executor.errors import ConfigError

__all__ = ["WORKERS_HELP", "spread", "workers"]

WORKERS_HELP = (
    "processes to run cells in, side by side, or `ray`: the Ray cluster that is running "
    "(extra [ray]; RAY_ADDRESS names another than this machine's)"
)

Task = TypeVar("Task")
Result = TypeVar("Result")


def workers(text: str) -> int | str:
    """`--workers`: a positive count, or "ray".

    Raises:
        ConfigError: It is neither.
    """
    if text == "ray":
        return text
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigError(f"--workers takes a positive count of processes, or ray; got {text!r}")


def spread(
    work: Callable[[Task], Result], tasks: Sequence[Task], count: int | str
) -> Iterator[tuple[int, Result]]:
    """Do every task; yields each one's place and result as it ends.

    Args:
        work: A function of a module; it, the tasks and the results must pickle.
        tasks: What to do.
        count: Processes, or "ray". With 1 all is done in this process, in order.

    Raises:
        ConfigError: Ray is not installed, or no cluster is running.
    """
    if count == 1:
        yield from ((place, work(task)) for place, task in enumerate(tasks))
        return
    with _pool(count, len(tasks)) as submit:
        futures = {submit(work, task): place for place, task in enumerate(tasks)}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()


Submit = Callable[..., "concurrent.futures.Future[Any]"]


@contextmanager
def _pool(count: int | str, tasks: int) -> Iterator[Submit]:
    if isinstance(count, int):
        spawn = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        pool = concurrent.futures.ProcessPoolExecutor(
            min(count, tasks), mp_context=spawn, initializer=end_with_parent
        )
        try:
            yield pool.submit
        finally:
            pool.shutdown(cancel_futures=True)
        return
    try:
        import ray
    except ImportError as error:
        raise ConfigError('--workers ray needs Ray: pip install "splitpilot[ray]"') from error
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise ConfigError(
            "--workers ray found no Ray cluster: start one with `ray start --head`, or set "
            "RAY_ADDRESS"
        ) from error
    try:
        yield lambda work, task: ray.remote(num_cpus=1)(work).remote(task).future()
    finally:
        ray.shutdown()
