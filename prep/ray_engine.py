"""Spread the preparation of records over a Ray cluster: `--engine ray`, with `pip install posmask[ray]`.

Ray only decides where a chunk is prepared, so the bytes are those of any other build. The folders of the images, of the
tagger and of --out have to be at the same path on all nodes; give absolute paths.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from posmask.prep.samples import Prepared, Preparer, Recipe
from posmask.prep.sources import Record


def prepare(chunks: Iterable[Sequence[Record]], recipe: Recipe, num_workers: int | None) -> Iterator[Prepared]:
    """The result of every chunk, in order. One tagger an actor; what a lost actor was working on is done again.

    Joins the cluster that RAY_ADDRESS names, else starts one on this machine. num_workers: None for all its processors.
    Raises ValueError when Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--engine ray needs Ray: pip install 'posmask[ray]', or leave --engine out") from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False, logging_level="error")
    try:
        num_cpus = int(ray.cluster_resources().get("CPU", 1))
        remote = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(Preparer)
        actors = [remote.remote(recipe) for _ in range(min(num_workers or num_cpus, num_cpus))]
        pending = deque()
        for number, chunk in enumerate(chunks):
            pending.append(actors[number % len(actors)].__call__.remote(chunk))
            if len(pending) > 2 * len(actors):
                yield ray.get(pending.popleft())
        while pending:
            yield ray.get(pending.popleft())
    finally:
        if started_here:
            ray.shutdown()
