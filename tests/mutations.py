"""Ways to break the kernels, each of which the interpreter must notice.

A mutation replaces a text of a kernel, of the block template or of a pipeline, once.
``python -m tests.mutate`` applies each in turn, and writes the table in
docs/interpreter.md.
"""

from __future__ import annotations

import dataclasses

_FORWARD = "kernels/attention/forward.cuh"
_SOFTMAX = "kernels/attention/online_softmax.cuh"
_BACKWARD = "kernels/attention/backward.cuh"
_WIDE = "kernels/attention/backward_wide.cuh"
_WIDE_DQ = "kernels/attention/backward_wide_dq.cuh"
_TURNS = "kernels/attention/turns.cuh"
_PREPARE = "kernels/attention/backward_prepare.cuh"
_FINISH = "kernels/attention/backward_finish.cuh"
_MATMUL = "kernels/matmul/kernel.cuh"
_PIPELINE = "include/tk/pipeline.cuh"
_BLOCK = "include/tk/block.cuh"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """``new`` stands for the occurrence of ``old`` that follows ``after``."""

    what: str
    program: str  # of tests/interpreter
    file: str  # below cuda/
    old: str
    new: str
    after: str = ""

    def apply(self, text: str) -> str:
        start = text.index(self.after)
        place = text.index(self.old, start)
        return text[:place] + self.new + text[place + len(self.old) :]


def _forward(what, old, new="", after="", file=_FORWARD):
    return Mutation(what, "attention_forward", file, old, new, after)


def _backward(what, old, new="", after="", file=_BACKWARD):
    return Mutation(what, "attention_backward", file, old, new, after)


def _wide(what, old, new="", after="", file=_WIDE):
    return Mutation(what, "attention_backward_wide", file, old, new, after)


def _matmul(what, old, new="", after="", file=_MATMUL):
    return Mutation(what, "matmul", file, old, new, after)


_LOOP = "Blocks keys = tile.keys;"
_DK_WAIT = "warpgroup::mma_wait<0>(dk_acc, ds);"
_Q_RELEASE = "release_q();"

MUTATIONS = [
    # -- Attention, forward --
    _forward("no wait for q", "shared.q_ring.wait(q_state);"),
    _forward("no wait for the first k", "shared.k_ring.wait(k_state);"),
    _forward("no wait for v", "shared.v_ring.wait(v_state);"),
    _forward("scores used before their wait", "warpgroup::mma_wait<0>(s_acc);"),
    _forward(
        "one product too many may be open",
        "warpgroup::mma_wait<1>(s_acc);",
        "warpgroup::mma_wait<2>(s_acc);",
    ),
    _forward(
        "p overwritten while p v reads it",
        "warpgroup::mma_wait<0>(o_acc, p);",
        "warpgroup::mma_wait<0>(o_acc);",
    ),
    _forward(
        "k released before its product is done",
        "warpgroup::mma_wait<0>(s_acc);\n      release_keys();",
        "release_keys();\n      warpgroup::mma_wait<0>(s_acc);",
    ),
    _forward("v never released", "shared.v_ring.release(v_state);"),
    _forward("q never released", "shared.q_ring.release(q_done);"),
    _forward("consumers never turn to the next q", "q_state = q_next;"),
    _forward("the next tile's q not waited for", "shared.q_ring.wait(q_next);"),
    _forward(
        "the next tile's scores from this tile's q",
        "issue_scores(q_next.stage);",
        "issue_scores(q_state.stage);",
    ),
    _forward(
        "consumers skip a stage of v",
        "v_state.advance();",
        "v_state.advance();\n      v_state.advance();",
    ),
    _forward(
        "too few bytes expected of q",
        "kConsumers * QTile::kBytes",
        "QTile::kBytes",
    ),
    _forward(
        "too many bytes expected of k",
        "acquire(kv_state, KTile::kBytes)",
        "acquire(kv_state, 2 * KTile::kBytes)",
    ),
    _forward(
        "the last block of keys is not loaded",
        "for (; tile.keys.valid(); tile.keys.next(map_row(params, tile)),",
        "for (tile.keys.next(map_row(params, tile)); tile.keys.valid();\n"
        "           tile.keys.next(map_row(params, tile)),",
    ),
    _forward(
        "keys loaded one row too far",
        "first_key, kv_head",
        "first_key + 1, kv_head",
    ),
    _forward(
        "queries of the wrong head",
        "tile.first_query + 64 * i, tile.head,",
        "tile.first_query + 64 * i, tile.head ^ 1,",
    ),
    _forward("the first block is not masked", "complete_scores(tile, tile.keys);"),
    _forward(
        "the next tile's first block is not masked",
        "complete_scores(next, next.keys);",
    ),
    _forward(
        "one block too many goes unmasked",
        "keys.all_end / kBlockKv}",
        "keys.all_end / kBlockKv + 1}",
    ),
    _forward(
        "too few arrivals expected for q",
        "shared.q_ring.init(4 * kConsumers);",
        "shared.q_ring.init(kConsumers);",
    ),
    _forward(
        "one arrival too few expected for k",
        "shared.k_ring.init(4 * kConsumers);",
        "shared.k_ring.init(4 * kConsumers - 1);",
    ),
    _forward(
        "one arrival too many expected for v",
        "shared.v_ring.init(4 * kConsumers);",
        "shared.v_ring.init(4 * kConsumers + 1);",
    ),
    _forward("out is not published to the copy engine", "publish_shared();"),
    _forward(
        "q loaded over out while the copy engine reads it",
        "if (warpgroup::leader()) tma::wait_read<0>();",
    ),
    _forward(
        "out copied before all warps have written it",
        "warpgroup::sync();",
        after="publish_shared();",
    ),
    _forward("copies of out are not committed", "tma::commit();"),
    _forward(
        "all lanes copy out",
        "if (warpgroup::leader()) {\n      tma::store",
        "{\n      tma::store",
    ),
    _forward(
        "a turn for half of the threads",
        "named_sync(static_cast<Turn>(kTurn + consumer), 256)",
        "named_sync(static_cast<Turn>(kTurn + consumer), 128)",
    ),
    _forward("the turn is not passed on", "pass_turn(consumer);", after=_LOOP),
    _forward(
        "the product p v is not committed",
        "warpgroup::mma_commit();",
        after="mma_AB(o_acc",
    ),
    _forward(
        "the sum starts from nothing",
        "bool accumulate = false;",
        "bool accumulate = true;",
    ),
    _forward(
        "out is not corrected",
        "if (corrects) warp::mul_rows(o_acc, o_acc, softmax.correction);",
    ),
    _forward(
        "row sums not brought together", "warp::finish_row_sum(row_sum);", file=_SOFTMAX
    ),
    _forward(
        "row maxima not brought together",
        "warp::finish_row_max(row_max);",
        file=_SOFTMAX,
    ),
    # -- Attention, backward --
    _backward(
        "dq's product before all rows of ds are there",
        "named_sync(kDsWritten, 128 * kConsumers);",
    ),
    _backward(
        "ds is not published to the tensor cores",
        "publish_shared();",
        after="ds_buffer ^= 1;",
    ),
    _backward("one buffer for ds instead of two", "ds_buffer ^= 1;"),
    _backward(
        "p overwritten while dv's product reads it",
        "mma_wait<2>(dv_acc, p)",
        "mma_wait<2>(dv_acc)",
    ),
    _backward("dq used before its wait", "mma_wait<1>(dq_acc)", "mma_wait<2>(dq_acc)"),
    _backward("dp used before its wait", "warpgroup::mma_wait<0>(dp_acc);"),
    _backward("dq overwritten on its way out", "shared.dq_ring.acquire(dq_state);"),
    _backward(
        "q released before its product is done",
        _DK_WAIT + "\n          " + _Q_RELEASE,
        _Q_RELEASE + "\n          " + _DK_WAIT,
    ),
    _backward(
        "q released beside the product that reads it",
        "warpgroup::mma_wait<2>(ds);\n          release_q();",
        "release_q();\n          warpgroup::mma_wait<2>(ds);",
    ),
    _backward(
        "ds overwritten while dk's product reads it",
        "warpgroup::mma_wait<2>(ds);",
        "warpgroup::mma_wait<3>(ds);",
    ),
    _backward("dout never released", "shared.dout_ring.release(state);"),
    _backward("no wait for q and lse", "shared.q_ring.wait(state);"),
    _backward("no wait for dout and delta", "shared.dout_ring.wait(state);"),
    _backward("no wait for k and v", "shared.kv_ring.wait(kv_state);"),
    _backward("k and v never released", "shared.kv_ring.release(kv_state);"),
    _backward(
        "dk overwrites k while others read it",
        "named_sync(kKeysRead, 128 * kConsumers);",
    ),
    _backward(
        "dk and dv are not published", "publish_shared();", after="kKeysRead, 128"
    ),
    _backward(
        "dk and dv copied before all warps have written them",
        "warpgroup::sync();",
        after="kKeysRead, 128",
    ),
    _backward(
        "k and v overwritten while dk and dv leave",
        "tma::wait_read<0>();",
        after="tma::store(params.dk",
    ),
    _backward("no turns", "take_turn(counter, turn);"),
    _backward("the turn is not passed on", "pass_turn(counter);"),
    _backward(
        "the turn is passed on before dq is written",
        "tma::wait<0>();\n      pass_turn",
        "pass_turn",
    ),
    _backward("every block overwrites dq", "if (turn == 0)", "if (turn >= 0)"),
    _backward("no block overwrites what dq held", "if (turn == 0)", "if (turn < 0)"),
    _backward(
        "dq given back while it is read",
        "tma::wait_read<0>();\n    shared.dq_ring",
        "shared.dq_ring",
    ),
    _backward(
        "bytes of lse are not expected",
        "acquire(state, QTile::kBytes + QVec::kBytes)",
        "acquire(state, QTile::kBytes)",
    ),
    _backward("delta of the wrong rows", "params.delta + row", "params.delta"),
    _backward("no mask", "if (masked) {", "if (false) {"),
    _backward(
        "keys before the window are seen",
        "first_query + kBlockQ - 1 + bounds.first_offset > first_key",
        "false",
    ),
    _backward(
        "the last queries are left out",
        "return q_blocks - first_q_block(n);",
        "return q_blocks - first_q_block(n) - 1;",
        file=_TURNS,
    ),
    _backward("two storers take every step", "if (step == storer)", "if (true)"),
    _backward(
        "prepare's barrier is not published", "publish_barriers();", file=_PREPARE
    ),
    _backward(
        "prepare's barrier used before it is there", "block::sync();", file=_PREPARE
    ),
    _backward("prepare does not wait for out", "shared.full.wait(0);", file=_PREPARE),
    _backward(
        "turns are not reset",
        "if (warpgroup::leader()) reset_turns",
        "if (false) reset_turns",
        file=_PREPARE,
    ),
    _backward("finish does not publish dq", "publish_shared();", file=_FINISH),
    _backward(
        "finish copies before all warps have written",
        "warpgroup::sync();",
        file=_FINISH,
    ),
    _backward("finish exits while dq is read", "tma::wait_read<0>();", file=_FINISH),
    _backward(
        "finish takes the wrong part",
        "cols<64>(part)",
        "cols<64>(part + 1)",
        file=_FINISH,
    ),
    # -- Attention, backward beyond a head dim of 128 --
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
        "block >= tile.first_block; --block) {\n          typename",
        "block > tile.first_block; --block) {\n          typename",
        file=_WIDE_DQ,
    ),
    # -- Matmul --
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
    # -- Pipelines and the block template --
    _matmul(
        "the producer waits for the wrong phase",
        "wait(state.phase ^ 1, at);",
        "wait(state.phase, at);",
        file=_PIPELINE,
    ),
    _matmul(
        "the producer does not wait for a free stage",
        "empty_[state.stage].wait(state.phase ^ 1, at);",
        file=_PIPELINE,
    ),
    _matmul("the phase never changes", "phase ^= 1;", file=_PIPELINE),
    _matmul(
        "a ring one stage too long",
        "++stage == kStages",
        "++stage == kStages + 1",
        file=_PIPELINE,
    ),
    _matmul(
        "all lanes release a stage",
        "if (warp::leader()) empty_",
        "empty_",
        file=_PIPELINE,
    ),
    _matmul(
        "two arrivals expected of one producer",
        "full_[i].init(1, at);",
        "full_[i].init(2, at);",
        file=_PIPELINE,
    ),
    _backward("dq filled without a fence", "publish_shared(at);", file=_PIPELINE),
    _backward(
        "a stage of dq filled too early",
        "empty_[state.stage].wait(state.phase ^ 1, at);",
        after="struct StorePipeline",
        file=_PIPELINE,
    ),
    _backward(
        "all lanes announce a stage of dq",
        "if (warp::leader()) full_",
        "full_",
        file=_PIPELINE,
    ),
    _forward("barriers are not published", "publish_barriers();", file=_BLOCK),
    _forward(
        "roles start before barriers are there",
        "} else {\n    sync();\n  }",
        "}",
        file=_BLOCK,
    ),
    _matmul(
        "a block exits while the other still releases to it",
        "cluster::sync();",
        after="warp::sync();",
        file=_BLOCK,
    ),
]
