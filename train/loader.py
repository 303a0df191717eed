"""From shards to batches on the device: sample order, packed text, decoded images.

Everything about a sample (its crop, its captions, whether its image is blanked, its mask) is drawn from a counter keyed
by the sample, and the order of an epoch is a pure function of (seed, epoch): ranks and resumes change nothing.
The place in the data is therefore one number, the step, and needs no state of its own.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from streaming.base.shuffle import get_shuffle
from torch import Tensor

from posmask.kernels import philox
from posmask.train.decode import BadSample, UndecodableImage, make_decoder
from posmask.train.remote import RemoteFolder, open_folder
from posmask.train.shard import Shard

log = logging.getLogger("posmask")

NUM_DOWNLOADS = 4  # shards copied at the same time


@dataclass(frozen=True)
class Batch:
    """B images with C captions of T tokens in all, a caption that is masked R times standing R times; S scores."""

    tokens: Tensor  # (T,) int32
    tags: Tensor  # (T,) int32, bits of posmask.prep.pos
    scores: Tensor  # (T, S) uint8
    caption_starts: Tensor  # (C+1,) int32
    caption_image: Tensor  # (C,) int32
    caption_key: Tensor  # (C, 3) int32 bit patterns: caption | masking << 16, id_lo, id_hi
    images: Tensor  # (B, 3, H, W) float, normalised, channels-last
    sample_ids: np.ndarray  # (B,) uint64, on the host
    host_tags: np.ndarray  # (T,) uint32, on the host: fixes the capacity of the masked rows
    host_caption_starts: np.ndarray  # (C+1,) int32, on the host
    max_caption_tokens: int
    max_image_tokens: int  # most text tokens of one image
    num_bad_samples: int  # left out because they are damaged or their image could not be decoded
    epoch: int
    answer_scores: Tensor | None = None  # (C, A) float32 where captions are questions: what each answer is worth

    def to(self, device: torch.device, dtype: torch.dtype) -> Batch:
        """Tensors on `device`, images in `dtype`; nothing waits."""
        names = ["tokens", "tags", "scores", "caption_starts", "caption_image", "caption_key"]
        names += ["answer_scores"] if self.answer_scores is not None else []
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, **moved, images=self.images.to(device, dtype, non_blocking=True))

    def used_on(self, stream: torch.cuda.Stream) -> None:
        """Keeps the memory of a batch that another stream made until what is queued on `stream` now has used it."""
        for value in vars(self).values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(stream)

    def with_blank_images(self) -> Batch:
        """The same captions before a blank image: zeros after normalisation, the mean colour."""
        return replace(self, images=torch.zeros_like(self.images))


class Shards:
    """Random access to the samples of one or more shard folders, each on a disk or at a URL.

    Raises ValueError if a folder is not ours, or if folders differ in tokenizer, bits or scores.
    """

    def __init__(self, folders: tuple[str, ...], cache: str | Path | None = None):
        """cache: where what comes from URLs is kept; None for remote.default_cache()."""
        self.folders = folders
        local = [open_folder(folder, cache and Path(cache)) for folder in folders]
        self.local_folders = tuple(folder.path for folder in local)  # with manifest, index and tokenizer
        self.manifests = [folder.manifest for folder in local]
        self.manifest = self.manifests[0]
        for folder, manifest in zip(folders[1:], self.manifests[1:], strict=True):
            for key in ("tokenizer", "bits_computed", "scores"):
                if getattr(manifest, key) != getattr(self.manifest, key):
                    remedy = f"--tokenizer {folders[0]}/tokenizer" if key == "tokenizer" else f"--units {folders[0]}"
                    raise ValueError(
                        f"{folder} and {folders[0]} differ in {key}: build both with the same settings and {remedy}"
                    )
        # Order and ranks are ours, so streaming's format is enough. StreamingDataset would add shared memory and lock
        # files that outlive a killed run, and 30 open files for each one that a process makes.
        self.shards = [
            Shard(folder, entry)
            for folder in local
            for entry in json.loads((folder.path / "index.json").read_text())["shards"]
        ]
        self.shard_sizes = np.array([shard.num_samples for shard in self.shards], np.int64)
        self.shard_ends = np.cumsum(self.shard_sizes)
        self._downloads: dict[int, Future] = {}
        remote = any(isinstance(folder, RemoteFolder) for folder in local)
        self._pool = ThreadPoolExecutor(NUM_DOWNLOADS, "download") if remote else None

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    def __getitem__(self, i: int) -> dict:
        """The columns of sample i. Raises BadSample where it is damaged, remote.Unavailable where it cannot be had."""
        shard = int(np.searchsorted(self.shard_ends, i, side="right"))
        if shard in self._downloads:
            self._downloads.pop(shard).result()
        return self.shards[shard][int(i - self.shard_ends[shard] + self.shard_sizes[shard])]

    def read(self, indices: Iterable[int]) -> list[dict | BadSample]:
        """Samples by index, what is wrong in the place of a damaged one: `Collator` raises it or leaves it out."""
        samples: list[dict | BadSample] = []
        for i in indices:
            try:
                samples.append(self[i])
            except BadSample as error:
                samples.append(error)
        return samples

    def prefetch(self, indices: np.ndarray) -> None:
        """Start to copy the shards that these samples are in, where those are at a URL and not here."""
        if self._pool is None:
            return
        for shard in np.unique(np.searchsorted(self.shard_ends, indices, side="right")).tolist():
            if self.shards[shard].path is None and shard not in self._downloads:
                self._downloads[shard] = self._pool.submit(self.shards[shard].open)

    def cancel_prefetch(self) -> None:
        """Start no more copies that `prefetch` was asked for."""
        self._downloads = {shard: copy for shard, copy in self._downloads.items() if not copy.cancel()}

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Sample indices (N,) int64 of one epoch; streaming's py1e keeps neighbours in few shards."""
        return get_shuffle("py1e", self.shard_sizes, 1, seed, epoch)


@dataclass(frozen=True)
class View:
    """What is shown of each sample."""

    seed: int
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    captions_per_image: int | None = None  # None: all of them
    blank_rate: float = 0.0
    crop_scale: tuple[float, float] = (1.0, 1.0)
    maskings_per_caption: int = 1  # each caption stands in a batch that often, every time with masks of its own


class Collator:
    """Turns samples into a `Batch` on the CPU (or, images decoded there, on the GPU)."""

    def __init__(
        self, view: View, num_scores: int, max_images: int, decode: str, device: torch.device,
        on_bad_sample: str = "stop", answers: tuple[str, ...] = (),
    ):  # fmt: skip
        """on_bad_sample: stop (BadSample), or skip a sample that is damaged or whose image cannot be decoded.

        A skipped sample leaves its batch with all its captions, so what is learned from the others stays as it was and
        the step's count of masked tokens, over which the loss is averaged, has those that are there. It is decided by
        the sample alone, hence the same on any number of ranks. answers: the vocabulary, where captions are questions.
        """
        assert on_bad_sample in ("stop", "skip")
        self.view = view
        self.skips_bad_samples = on_bad_sample == "skip"
        self.named: set[str] = set()  # bad samples that stderr has named
        self.num_scores = num_scores
        self.device = device
        self.answer_index = {answer: i for i, answer in enumerate(answers)}
        self.decoder = make_decoder(decode, view.image_size, max_images, device)
        # (S * 3,), a row of pixels: broadcast over the three channels alone, nothing would be vectorised.
        mean, std = (torch.tensor(x).repeat(view.image_size) for x in (view.image_mean, view.image_std))
        self.scale, self.shift = (1 / (255 * std)).to(device), (-mean / std).to(device)

    def __call__(self, samples: list[dict | BadSample], epoch: int) -> Batch:
        """Raises BadSample for one that is bad, unless those are skipped and others are left."""
        num_given = len(samples)
        bad = [sample for sample in samples if isinstance(sample, BadSample)]
        for error in bad:
            self._leave_out(error, num_left=num_given - len(bad))
        samples, images = self.decode_images([s for s in samples if not isinstance(s, BadSample)], epoch)
        ids = np.array([sample["id"] for sample in samples], np.uint64)
        tokens, tags, scores, lengths, caption_image, caption_words, answers = [], [], [], [], [], [], []
        chosen = self._draw_captions(samples, ids, epoch)
        for i, sample in enumerate(samples):
            starts = np.concatenate([[0], np.cumsum(sample["caption_lengths"], dtype=np.int64)])
            for caption, masking in product(chosen[i], range(self.view.maskings_per_caption)):
                span = slice(starts[caption], starts[caption + 1])
                tokens.append(sample["tokens"][span])
                tags.append(sample["tags"][span])
                if self.num_scores:
                    scores.append(sample["scores"][span])
                lengths.append(span.stop - span.start)
                caption_image.append(i)
                caption_words.append(caption | masking << 16)
                if self.answer_index:
                    answers.append(sample["answers"][caption])
        caption_starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        host_tags = np.concatenate(tags)
        num_tokens = len(host_tags)
        return Batch(
            tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int32)),
            tags=torch.from_numpy(host_tags.view(np.int32)),
            scores=torch.from_numpy(np.concatenate(scores) if self.num_scores else np.zeros((num_tokens, 0), np.uint8)),
            caption_starts=torch.from_numpy(caption_starts),
            caption_image=torch.tensor(caption_image, dtype=torch.int32),
            caption_key=caption_keys(ids[caption_image], np.array(caption_words)),
            images=images,
            sample_ids=ids,
            host_tags=host_tags,
            host_caption_starts=caption_starts,
            max_caption_tokens=int(max(lengths)),
            max_image_tokens=int(np.bincount(caption_image, lengths).max()),
            num_bad_samples=num_given - len(samples),
            epoch=epoch,
            answer_scores=self._answer_scores(answers) if self.answer_index else None,
        )

    def _leave_out(self, error: BadSample, num_left: int) -> None:
        """Raises `error`, unless bad samples are skipped and others are left; names each once."""
        if not self.skips_bad_samples or num_left == 0:
            raise error
        if error.what not in self.named:
            self.named.add(error.what)
            log.warning("--on-bad-sample skip: %s", error.what)

    def _answer_scores(self, answers: list[dict[str, float]]) -> Tensor:
        """(C, A) float32; answers outside the vocabulary are left out."""
        scores = torch.zeros(len(answers), len(self.answer_index))
        for row, given in zip(scores, answers, strict=True):
            for answer in given.keys() & self.answer_index.keys():
                row[self.answer_index[answer]] = given[answer]
        return scores

    def _draw_captions(self, samples: list[dict], ids: np.ndarray, epoch: int) -> list[list[int]]:
        """min(K, available) captions of each sample, without replacement, in their stored order."""
        counts = [len(sample["caption_lengths"]) for sample in samples]
        k = self.view.captions_per_image
        if k is None or all(count <= k for count in counts):
            return [list(range(count)) for count in counts]
        captions = np.concatenate([np.arange(count) for count in counts])
        race = _draw(philox.CAPTION, np.repeat(ids, counts), captions, self.view.seed, epoch)[:, 0]
        runs = np.split(race, np.cumsum(counts)[:-1])
        return [sorted(np.argsort(run, kind="stable")[:k].tolist()) for run in runs]

    def decode_images(self, samples: list[dict], epoch: int) -> tuple[list[dict], Tensor]:
        """The samples whose image could be decoded, and their images."""
        samples, pixels = list(samples), None
        while pixels is None:
            ids = np.array([sample["id"] for sample in samples], np.uint64)
            encoded = [np.array(memoryview(sample["image"])) for sample in samples]  # a copy: torch wants it writable
            try:
                pixels = self.decoder(encoded, *self._crops(ids, epoch), [sample["key"] for sample in samples])
            except UndecodableImage as error:
                self._leave_out(error, num_left=len(samples) - 1)
                del samples[error.index]
        images = pixels.flatten(2).float().mul_(self.scale).add_(self.shift)
        images = images.view(pixels.shape).permute(0, 3, 1, 2)  # the permutation is what makes it channels-last
        if self.view.blank_rate > 0:
            draw = _draw(philox.IMAGE, ids, np.zeros(len(ids), np.int64), self.view.seed, epoch)[:, 0]
            blank = torch.from_numpy(draw < round(self.view.blank_rate * 2**32)).to(images.device)
            images.masked_fill_(blank.view(-1, 1, 1, 1), 0.0)
        return samples, images

    def _crops(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Anchors and shapes (B, 2) fp32 as (width, height) shares of the image.

        The area is uniform in --crop-scale; the aspect ratio changes by at most what that area leaves room for, so that
        mild crops stay mild (torchvision's 3/4..4/3 would cut a third of the image to reach its ratio).
        """
        low, high = self.view.crop_scale
        if low == high == 1.0:
            return np.zeros((len(ids), 2), np.float32), np.ones((len(ids), 2), np.float32)
        u = _draw(philox.CROP, ids, np.zeros(len(ids), np.int64), self.view.seed, epoch) / 2.0**32  # (B, 4) in [0, 1)
        area = low + (high - low) * u[:, 0]
        ratio = area ** (2 * u[:, 1] - 1)  # width / height, relative to the image's own
        shapes = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1)
        anchors = u[:, 2:] * (1 - shapes)
        return anchors.astype(np.float32), shapes.astype(np.float32)


def caption_keys(ids: np.ndarray, caption_words: np.ndarray) -> Tensor:
    """(C, 3) int32 bit patterns that name each caption in the counter: which one it is, id's low and high word.

    ids (C,) uint64; caption_words (C,) integers, index in the sample | masking << 16.
    """
    words = [caption_words, ids & np.uint64(philox.U32), ids >> np.uint64(32)]
    return torch.from_numpy(np.stack([word.astype(np.uint32) for word in words], 1).view(np.int32))


def _draw(purpose: int, ids: np.ndarray, captions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Four words (N, 4) int64 in [0, 2^32) for each of N pairs of sample id and caption."""
    position, row = torch.zeros(len(ids), dtype=torch.int64), torch.arange(len(ids))
    return torch.stack(philox.draw_words(purpose, position, row, caption_keys(ids, captions), seed, epoch), 1).numpy()


class Loader:
    """Micro-batches of one rank.

    Step s takes the s-th run of `batch_size` samples of the endless sequence of epochs (an epoch's rest that does not
    fill a batch is left out); rank r of W takes the r-th part of it, in `accumulation` micro-batches.
    """

    def __init__(
        self, shards: Shards, collate: Collator, *, seed: int, batch_size: int, micro_batch_size: int,
        rank: int, world_size: int, start_step: int = 0, num_steps: int, prefetch: int | None = None,
    ):  # fmt: skip
        """prefetch: micro-batches that a thread prepares ahead of the consumer; 0: each is prepared when asked for.

        None: 2 for a GPU. On a CPU 0: the thread would take a core from a training step whose OpenMP threads all wait
        for the one without, so step and preparation take turns at all cores instead.
        """
        assert len(shards) >= batch_size, "an epoch without a batch"
        self.shards, self.collate = shards, collate
        self.seed, self.batch_size, self.micro_batch_size = seed, batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.steps = range(start_step, num_steps)
        on_gpu = collate.device.type == "cuda"
        if prefetch is None:
            prefetch = 2 if on_gpu else 0
        self._queue: queue.Queue = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        # Copies and decoding have a stream of their own; on that of the training step they would wait behind it.
        self._stream = torch.cuda.Stream(collate.device) if on_gpu and prefetch else None
        self._thread = threading.Thread(target=self._produce, name="loader", daemon=True) if prefetch else None
        if self._thread is not None:
            self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        if self._thread is None:
            yield from self._batches()
            return
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, ready = item
            if ready is not None:
                stream = torch.cuda.current_stream(self.collate.device)
                stream.wait_event(ready)
                batch.used_on(stream)
            yield batch

    def close(self) -> None:
        """Stops the thread, if there is one; a decoder may not be torn down under it."""
        self._stop.set()
        self.shards.cancel_prefetch()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def _produce(self) -> None:
        try:
            with torch.cuda.stream(self._stream):  # None: no other stream
                for batch in self._batches():
                    if self._stop.is_set():
                        return
                    self._queue.put((batch, self._stream and self._stream.record_event()))
            self._queue.put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self._queue.put(error)

    def _batches(self) -> Iterator[Batch]:
        per_epoch = len(self.shards) // self.batch_size
        per_rank = self.batch_size // self.world_size
        epoch, order = -1, None
        for step in self.steps:
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self.shards.order(self.seed, epoch)
            first = (step % per_epoch) * self.batch_size + self.rank * per_rank
            self.shards.prefetch(order[first : first + per_rank])
            self.shards.prefetch(order[first + self.batch_size : first + self.batch_size + per_rank])  # the next step's
            for start in range(first, first + per_rank, self.micro_batch_size):
                batch = self.collate(self.shards.read(order[start : start + self.micro_batch_size]), epoch)
                yield batch.to(batch.images.device, batch.images.dtype)


def evaluation_batches(
    shards: Shards, collate: Collator, batch_size: int, num_images: int | None, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """The first `num_images` samples (None: all) in stored order.

    Rank r of W takes the r-th of W equal runs (up to W - 1 samples are left out), so that all make as many batches: a
    forward under ZeRO-3 is a collective.
    """
    per_rank = min(num_images or len(shards), len(shards)) // world_size
    for start in range(rank * per_rank, (rank + 1) * per_rank, batch_size):
        yield collate(shards.read(range(start, min(start + batch_size, (rank + 1) * per_rank))), epoch=0)
