"""Ways to break attention's backward kernels beyond a head dim of 128."""

from tests.mutation import Mutation

_WIDE = "kernels/attention/backward_wide.cuh"
_WIDE_DQ = "kernels/attention/backward_wide_dq.cuh"


def _wide(what, old, new="", after="", file=_WIDE):
    return Mutation(what, "attention_backward_wide", file, old, new, after)


MUTATIONS = [
    _wide("no wait for q and lse", "shared.q_ring.wait(q_state);"),
    _wide("no wait for dout and delta", "shared.dout_ring.wait(dout_state);"),
    _wide("no wait for k and v", "shared.kv_ring.wait(kv_state);"),
    _wide(
        "p overwritten before it is taken",
        "named_sync(kWeightsTaken, 128 * kConsumers);",
    ),
    _wide(
        "p taken before it is there", "named_sync(kWeightsShared, 128 * kConsumers);"
    ),
    _wide(
        "nobody says that p's memory is free",
        "named_arrive(kWeightsTaken, 128 * kConsumers);",
        after="sum_dk(",
    ),
    _wide(
        "p overwritten while dv's product reads it",
        "mma_wait<0>(dv_acc, p);",
        "mma_wait<0>(dv_acc);",
    ),
    _wide("dout released beside dv's product", "warpgroup::mma_wait<0>(dv_acc, p);"),
    _wide("scores used before their wait", "warpgroup::mma_wait<1>(s_acc);"),
    _wide(
        "dp used before its wait",
        "warpgroup::mma_wait<0>(dp_acc);",
        after="if constexpr (kDkFirst)",
    ),
    _wide(
        "q released beside dk's product",
        "warpgroup::mma_wait<1>(dk_acc, ds);\n            release_q();",
        "release_q();\n            warpgroup::mma_wait<1>(dk_acc, ds);",
    ),
    _wide(
        "with three stages, q released beside dk's product",
        "warpgroup::mma_wait<0>(dk_acc, ds);\n            release_q();",
        "release_q();\n            warpgroup::mma_wait<0>(dk_acc, ds);",
    ),
    _wide(
        "stages released to this block alone", "ring.release(state, rank() ^ 1);", ";"
    ),
    _wide("stages released to the other block alone", "ring.release(state);"),
    _wide("both blocks load to both", "else if (rank() == kLoader)", "else if (true)"),
    _wide(
        "a block of the cluster has the other's keys",
        "64 * rank()",
        "64 * (rank() ^ 1)",
    ),
    _wide(
        "dv overwrites v while dp reads it",
        "named_sync(kKeysRead, 128 * kConsumers);",
    ),
    _wide("dk and dv are not published", "publish_shared();"),
    _wide(
        "dk and dv copied before all warps have written them",
        "warpgroup::sync();",
    ),
    _wide("k and v overwritten while dk and dv leave", "tma::wait_read<0>();"),
    _wide(
        "keys after the diagonal are seen",
        "first_query + bounds.last_offset < tile.first_key + 63",
        "false",
    ),
    _wide("dk is not scaled", "warp::mul(dk_acc, dk_acc, params.scale);"),
    _wide(
        "dq: no wait for q and dout",
        "shared.rows_ring[consumer].wait(rows_state);",
        file=_WIDE_DQ,
    ),
    _wide("dq: no wait for the next k", "shared.k_ring.wait(next);", file=_WIDE_DQ),
    _wide(
        "dq: k released beside its product",
        "warpgroup::mma_wait<1>(dq_acc, ds);",
        "warpgroup::mma_wait<2>(dq_acc, ds);",
        file=_WIDE_DQ,
    ),
    _wide(
        "dq: dp used before its wait",
        "warpgroup::mma_wait<0>(dp_acc);",
        after="typename Ring::State next",
        file=_WIDE_DQ,
    ),
    _wide("dq is not published", "publish_shared();", file=_WIDE_DQ),
    _wide("q overwritten while dq leaves", "tma::wait_read<0>();", file=_WIDE_DQ),
    _wide(
        "dq: the first block that is seen is left out",
        "return at >= first;",
        "return at > first;",
        file=_WIDE_DQ,
    ),
]
