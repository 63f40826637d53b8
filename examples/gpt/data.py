"""Text found on every machine: the source of Python's standard library, as bytes."""

import dataclasses
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator

import numpy as np

# Not the library's own source: installed packages, the test suite (its size would drown
# the rest), generated tables, and files that a distribution or a build puts in.
_EXCLUDED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test", "encodings", "pydoc_data"),
}
_EXCLUDED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")
_VALIDATION_ONE_IN = 12  # files


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two byte streams, split by file; a zero byte follows every file."""

    train: np.ndarray
    validation: np.ndarray
    num_files: int


def default_folder() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_path("stdlib"))


def source_files(folder: pathlib.Path) -> list[str]:
    """The relative paths of the files used, in an order no machine changes."""
    names = []
    for path in folder.rglob("*.py"):
        relative = path.relative_to(folder)
        excluded = _EXCLUDED_FOLDERS.intersection(relative.parts[:-1])
        if not excluded and not relative.name.startswith(_EXCLUDED_FILES):
            names.append(relative.as_posix())
    return sorted(names)


def load_corpus(folder: pathlib.Path | None = None) -> Corpus:
    """Reads `*.py` under `folder` (default: the standard library).

    A file is for validation if a checksum of its name says so: the split needs no list,
    and a file added or removed moves no other.

    Raises:
      ValueError: the folder has no Python source for one of the two streams.
    """
    folder = default_folder() if folder is None else pathlib.Path(folder)
    streams: dict[bool, list[bytes]] = {True: [], False: []}
    for name in source_files(folder):
        for_validation = zlib.crc32(name.encode()) % _VALIDATION_ONE_IN == 0
        streams[for_validation] += [(folder / name).read_bytes(), b"\0"]
    if not streams[True] or not streams[False]:
        found = sum(map(len, streams.values())) // 2
        raise ValueError(
            f"data_dir: {folder} holds {found} usable *.py files, too few to train on "
            "and to validate with; point --data_dir at a folder of Python source"
        )
    train, validation = (
        np.frombuffer(b"".join(streams[key]), np.uint8) for key in (False, True)
    )
    return Corpus(train, validation, sum(map(len, streams.values())) // 2)


def unigram_entropy(stream: np.ndarray) -> float:
    """Entropy of the byte frequencies, in nats.

    No model that ignores context can have a lower loss on the same stream.
    """
    counts = np.bincount(stream, minlength=256)
    frequencies = counts[counts > 0] / stream.size
    return float(-(frequencies * np.log(frequencies)).sum())


def _windows(stream: np.ndarray, starts: np.ndarray, seqlen: int) -> np.ndarray:
    return stream[starts[:, None] + np.arange(seqlen + 1)].astype(np.int32)


def check_length(stream: np.ndarray, seqlen: int) -> None:
    if stream.size <= seqlen:
        raise ValueError(
            f"seqlen is {seqlen}, but a stream of the data has {stream.size} bytes; "
            "expected more bytes than seqlen"
        )


def training_batch(
    stream: np.ndarray, step: int, *, seed: int, batch_size: int, seqlen: int
) -> np.ndarray:
    """The batch of one step, int32 [B, T + 1]; a function of `seed` and `step` alone.

    Nothing is carried from step to step, so a resumed run sees what it would have seen.
    """
    random = np.random.default_rng((seed, step))
    starts = random.integers(0, stream.size - seqlen, size=batch_size)
    return _windows(stream, starts, seqlen)


def validation_batches(
    stream: np.ndarray, *, num_windows: int, batch_size: int, seqlen: int
) -> Iterator[np.ndarray]:
    """Evenly spaced windows; their number is rounded up to whole batches."""
    num_batches = -(-num_windows // batch_size)
    spread = np.linspace(0, stream.size - seqlen - 1, num_batches * batch_size)
    starts = spread.astype(np.int64).reshape(num_batches, batch_size)
    for row in starts:
        yield _windows(stream, row, seqlen)
