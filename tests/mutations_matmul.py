"""Ways to break the matmul kernel."""

from tests.mutation import Mutation

_MATMUL = "kernels/matmul/kernel.cuh"


def _matmul(what, old, new="", after="", file=_MATMUL):
    return Mutation(what, "matmul", file, old, new, after)


MUTATIONS = [
    _matmul("no wait for a stage", "shared.ring.wait(state);"),
    _matmul(
        "a stage released while a product reads it",
        "warpgroup::mma_wait<1>();",
        "warpgroup::mma_wait<2>();",
    ),
    _matmul("stages never released", "release(shared.ring, previous);"),
    _matmul(
        "the stage in use is released",
        "release(shared.ring, previous);",
        "release(shared.ring, state);",
    ),
    _matmul(
        "the other block is not told of a release",
        "if constexpr (kClusterSize > 1) ring.release(state, cluster::rank() ^ 1);",
    ),
    _matmul(
        "releases of one block expected of two",
        "4 * kConsumers * kClusterSize",
        "4 * kConsumers",
    ),
    _matmul("sums start from nothing", "step > 0);", "true);"),
    _matmul(
        "sums used before a wait names them", "mma_wait<0>(acc[r])", "mma_wait<0>()"
    ),
    _matmul("products are not committed", "warpgroup::mma_commit();"),
    _matmul(
        "bytes of b are not expected", "ATile::kBytes + BTile::kBytes", "ATile::kBytes"
    ),
    _matmul(
        "a piece overwritten on its way out",
        "tma::wait_read<1>()",
        "tma::wait_read<2>()",
    ),
    _matmul("a piece overwritten before the leader has waited", "warpgroup::sync();"),
    _matmul("a piece is not published", "publish_shared();"),
    _matmul(
        "a piece copied before all warps have written it",
        "warpgroup::sync();",
        after="publish_shared();",
    ),
    _matmul(
        "exit while the last pieces leave",
        "if (warpgroup::leader()) tma::wait_read<0>();",
    ),
    _matmul(
        "the tail of K is left out",
        "ceil_div(params.k, kBlockK);",
        "params.k / kBlockK;",
        after="compute(",
    ),
    _matmul("both blocks load the same half of b", "col + rank * kPart", "col"),
    _matmul("pieces land in the wrong columns", "col + piece * 64", "col + piece * 32"),
]
