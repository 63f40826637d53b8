"""The copy engine's boxes: over edges, outside, added, and to a cluster."""

import itertools

import numpy as np
import pytest
from tiles import BF16, FLOAT, FP16, NAMES, assert_same, integers, kernel, normals

pytestmark = pytest.mark.usefixtures("tile_implementation")

# Type, rows and columns of the box, and the array's shape. Panels of 32 bytes have 8
# floats or 16 halves; of 64 twice that (96 in three); of 128 four times (128 in two).
BOXES = [
    (FLOAT, 16, 8, (27, 12)),
    (FP16, 8, 16, (27, 24)),
    (BF16, 64, 64, (100, 72)),
    (FLOAT, 24, 16, (3, 40, 20)),
    (BF16, 16, 96, (2, 21, 104)),
    (FP16, 40, 128, (2, 50, 136)),
    (BF16, 16, 32, (2, 3, 21, 40)),
    (FLOAT, 8, 64, (2, 2, 13, 68)),
]
BOX_KERNELS = {
    case: kernel("tma", "boxes", *case[:3], len(case[3]), shared=True) for case in BOXES
}
ADDED = [(FLOAT, 16, 32, (27, 44)), (BF16, 16, 64, (27, 72)), (FP16, 8, 16, (13, 24))]
ADDED_KERNELS = {
    case: kernel("tma", "added_boxes", *case[:3], shared=True) for case in ADDED
}
MULTICAST = {
    case: kernel("tma", "multicast", *case, shared=True, cluster_size=2)
    for case in ((BF16, 64, 64, 3), (FLOAT, 32, 16, 3), (FP16, 32, 128, 4))
}


def corners(shape, rows, cols, itemsize):
    """Coordinates of boxes, innermost first: side by side from the first element to
    beyond the last, some wholly outside; and others that start before the array.

    A box starts on 16 bytes of its row: on any other column the copy engine stops the
    kernel as an illegal instruction.
    """
    steps = [cols, rows, *[1] * (len(shape) - 2)]
    units = [16 // itemsize, *[1] * (len(shape) - 1)]
    ends = [size + step for size, step in zip(shape[::-1], steps, strict=True)]
    inside = itertools.product(*map(range, [0] * len(shape), ends, steps))
    before = [
        -(step // 2 // unit * unit or unit)
        for step, unit in zip(steps, units, strict=True)
    ]
    around = itertools.product(*map(range, before, ends, steps))
    return np.array([*inside, *(at for at in around if min(at) < 0)], np.int32)


def boxes_of(x, coordinates, rows, cols):
    """Each box's elements (zero outside of x), and which elements of x it covers."""
    for at in coordinates:
        first = np.array([*at[:1:-1], at[1], at[0]])
        size = np.array([*[1] * (x.ndim - 2), rows, cols])
        low, high = np.maximum(first, 0), np.minimum(first + size, x.shape)
        box = np.zeros((rows, cols), np.float32)
        inside = tuple(slice(a, max(a, b)) for a, b in zip(low, high, strict=True))
        part = x[inside]
        if part.size:
            row, col = low[-2] - at[1], low[-1] - at[0]
            part = part.reshape(part.shape[-2:])
            box[row : row + part.shape[0], col : col + part.shape[1]] = part
        yield box, inside


@pytest.mark.parametrize("case", BOXES, ids=str)
@pytest.mark.parametrize("chosen", ["all", "odd"])
def test_boxes(rng, case, chosen):
    """What is outside reads as zero and is not written; nor is what no box covers.

    Only a load may start before the array's first element: the copy engine refuses a
    store that does.
    """
    name, rows, cols, shape = case
    x = normals(rng, shape, NAMES[name])
    coordinates = corners(shape, rows, cols, x.itemsize)
    if chosen == "odd":
        coordinates = coordinates[1::2]
    boxes, covered = zip(
        *boxes_of(x.astype(np.float32), coordinates, rows, cols), strict=True
    )
    expected = np.full(shape, 7, np.float32)
    for inside, at in zip(covered, coordinates, strict=True):
        if (at >= 0).all():
            expected[inside] = x[inside]
    loaded, stored = BOX_KERNELS[case](
        [((len(boxes), rows, cols), x.dtype), (shape, x.dtype)],
        x,
        coordinates,
        tiles=dict.fromkeys((0, 2, 3), (rows, cols)),
    )
    assert_same(loaded, np.stack(boxes))
    assert_same(stored, expected)
    if chosen == "all":
        assert_same(stored, x.astype(np.float32))


@pytest.mark.parametrize("case", ADDED, ids=str)
def test_added_boxes(rng, case):
    name, rows, cols, shape = case
    x = integers(rng, shape, NAMES[name])
    coordinates = corners(shape, rows, cols, x.itemsize)
    coordinates = coordinates[(coordinates >= 0).all(1)][::2]
    expected = np.ones(shape, np.float32)
    for _, inside in boxes_of(x.astype(np.float32), coordinates, rows, cols):
        expected[inside] += 2 * x[inside].astype(np.float32)
    (result,) = ADDED_KERNELS[case](
        [(shape, x.dtype)], x, coordinates, tiles=dict.fromkeys((0, 2), (rows, cols))
    )
    assert_same(result, expected)


@pytest.mark.parametrize(("name", "rows", "cols", "rank"), MULTICAST)
def test_multicast(rng, name, rows, cols, rank):
    x = normals(rng, (3, rows, cols), NAMES[name])
    (result,) = MULTICAST[name, rows, cols, rank](
        [((6, rows, cols), x.dtype)],
        x if rank == 3 else x[:, None],
        grid=6,
        tiles={0: (rows // 2, cols), 1: (rows, cols)},
    )
    assert_same(result, np.repeat(x, 2, 0).astype(np.float32))
