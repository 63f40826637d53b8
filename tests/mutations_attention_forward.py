"""Ways to break attention's forward kernel."""

from tests.mutation import Mutation

_FORWARD = "kernels/attention/forward.cuh"
_COPIES = "kernels/attention/forward_copies.cuh"
_SOFTMAX = "kernels/attention/online_softmax.cuh"
_PIPELINE = "include/tk/pipeline.cuh"
_SKIP_TURN = "const auto skip_turn"
_LEAVE = "const auto leave_block"
_HIDDEN = "if (others_go_on) {"
_FIRST = "if (tile.empty()) {"
_LOOP = "Blocks keys = tile.keys;"


def _forward(what, old, new="", after="", file=_FORWARD):
    return Mutation(what, "attention_forward", file, old, new, after)


MUTATIONS = [
    _forward("no wait for q", "q_ring.wait(q_state);"),
    _forward("no wait for the first k", "shared.k_ring.wait(k_state);", after=_FIRST),
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
        "warpgroup::mma_wait<0>(s_acc);\n        release_keys();",
        "release_keys();\n        warpgroup::mma_wait<0>(s_acc);",
    ),
    _forward("v never released", "shared.v_ring.release(v_state);"),
    _forward("q never released", "q_ring.release(q_done);"),
    _forward(
        "q, of one stage, never released",
        "release_queries();",
        after="release_rows();\n          release_queries();",
    ),
    _forward(
        "q, of one stage, released before its scores are there",
        "softmax.start(s_acc);",
        "softmax.start(s_acc);\n        release_queries();",
    ),
    _forward(
        "rows stored one too far",
        "o_acc, first_query, 0);",
        "o_acc, first_query + 1, 0);",
    ),
    _forward("consumers never turn to the next q", "q_state = q_next;"),
    _forward("the next tile's q not waited for", "q_ring.wait(q_next);"),
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
        "kConsumers / kQRings * QTile::kBytes",
        "QTile::kBytes / 2",
        file=_COPIES,
    ),
    _forward(
        "too many bytes expected of k",
        "acquire(kv_state, KTile::kBytes)",
        "acquire(kv_state, 2 * KTile::kBytes)",
        file=_COPIES,
    ),
    _forward(
        "the last block of keys is not loaded",
        "for (; tile.keys.valid(); tile.keys.next(Walk::map_row(params, tile)),",
        "for (tile.keys.next(Walk::map_row(params, tile)); tile.keys.valid();\n"
        "           tile.keys.next(Walk::map_row(params, tile)),",
        file=_COPIES,
    ),
    _forward(
        "keys loaded one row too far",
        "first_key, kv_head",
        "first_key + 1, kv_head",
        file=_COPIES,
    ),
    _forward(
        "queries of the wrong head",
        "tile.first_query + 64 * i, tile.head,",
        "tile.first_query + 64 * i, tile.head ^ 1,",
        file=_COPIES,
    ),
    _forward("the first block is not masked", "complete_scores(tile, tile.keys);"),
    _forward(
        "the next tile's first block is not masked",
        "complete_scores(next, next.keys);",
    ),
    _forward(
        "one block too many goes unmasked",
        "tile.unmasked_end = (kWalksUp ? keys.all_end : keys.all_end - 1) / kBlockKv;",
        "tile.unmasked_end = keys.all_end / kBlockKv + 1;",
    ),
    _forward(
        "too few arrivals expected for q",
        "ring.init(4 * kConsumers / kQRings);",
        "ring.init(kConsumers / kQRings);",
        file=_COPIES,
    ),
    _forward(
        "one arrival too few expected for k",
        "shared.k_ring.init(4 * kConsumers);",
        "shared.k_ring.init(4 * kConsumers - 1);",
        file=_COPIES,
    ),
    _forward(
        "one arrival too many expected for v",
        "shared.v_ring.init(4 * kConsumers);",
        "shared.v_ring.init(4 * kConsumers + 1);",
        file=_COPIES,
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
        "if (warpgroup::leader()) {\n        tma::store",
        "{\n      tma::store",
    ),
    _forward(
        "a turn for half of the threads",
        "named_sync(static_cast<Turn>(kTurn + consumer), 256)",
        "named_sync(static_cast<Turn>(kTurn + consumer), 128)",
    ),
    _forward(
        "a consumer leaves out a block that it sees",
        "return ceil_div(keys.end, kBlockKv);",
        "return keys.end / kBlockKv;",
    ),
    _forward(
        "no wait for k that is left out", "shared.k_ring.wait(k_state);", after=_LEAVE
    ),
    _forward(
        "no wait for v that is left out", "shared.v_ring.wait(v_state);", after=_LEAVE
    ),
    _forward("k that is left out is kept", "release_keys();", after=_LEAVE),
    _forward("v that is left out is kept", "release_values();", after=_LEAVE),
    _forward(
        "no turn for a block that is left out", "wait_turn(consumer);", after=_SKIP_TURN
    ),
    _forward(
        "the turn of a block that is left out is kept",
        "pass_turn(consumer);",
        after=_SKIP_TURN,
    ),
    _forward(
        "what others see after a consumer's last block is kept",
        "leave_block(has_turn);",
        ";",
        after=_HIDDEN,
    ),
    _forward(
        "a turn too many for what others see after a consumer's last block",
        "bool has_turn = false;",
        "bool has_turn = true;",
        after=_HIDDEN,
    ),
    _forward(
        "no turn beside the others' next scores, after blocks that only they see",
        "if (linked) skip_turn();",
        after=_HIDDEN,
    ),
    _forward(
        "one turn too many before the first scores",
        "if (!first) wait_turn(consumer);",
        "wait_turn(consumer);",
    ),
    _forward(
        "no turn for the last product where the next tile starts without scores",
        "if (takes_turn) wait_turn(consumer);",
    ),
    _forward(
        "no turn for a tile of which a consumer sees nothing",
        "skip_turn();",
        ";",
        after="valid = receive(tile);",
    ),
    _forward(
        "queries before the first are stored",
        "if (kMasked && first_query < 0) return;",
    ),
    _forward(
        "the producer does not say where the work ends", "-1});", "0});", file=_COPIES
    ),
    _forward(
        "fewer consumers are told of tiles than there are",
        "shared.tiles.init(4 * kConsumers);",
        "shared.tiles.init(kConsumers);",
        file=_COPIES,
    ),
    _forward(
        "no wait for the next tile's place",
        "ring_.wait(state, at);",
        after="void receive(",
        file=_PIPELINE,
    ),
    _forward(
        "the next tile's place overwrites the last",
        "ring_.empty_[state.stage].wait(state.phase ^ 1, at);",
        after="void send(",
        file=_PIPELINE,
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
    _forward(
        "weights that grow large are not noticed",
        "return sum > kLargeSum; });",
        "return sum < 0.0f; });",
        file=_SOFTMAX,
    ),
    _forward(
        "large weights stay as they are",
        "warp::mul_rows(scores, scores, correction);",
        file=_SOFTMAX,
    ),
    _forward(
        "a correction that vanishes is applied",
        "if (sum > kHugeSum) return kInfinity - kInfinity;",
        file=_SOFTMAX,
    ),
    _forward(
        "tiles whose weights overflowed are not marked",
        "shared.marks.set(consumer, Walk::mark_of(tile));",
        ";",
    ),
    _forward(
        "tiles whose weights overflowed are not done again",
        "if (wanted == 0) break;",
        "break;",
    ),
    _forward(
        "tiles are done again in the same way",
        "if (kKeepsMax && !repeats && !is_masked(tile, keys)) {",
        "if (kKeepsMax && !is_masked(tile, keys)) {",
    ),
    _forward(
        "rows are written again while the copy engine writes them",
        "if (warpgroup::leader()) tma::wait<0>();",
    ),
    _forward(
        "the producer does not know of the consumers' marks",
        "wanted = shared.marks.wait_by_thread();",
        "wanted = 0;",
        file=_COPIES,
    ),
    _forward(
        "consumers do not say that they are done",
        "if (warp::leader()) closed_.arrive(at);",
        file=_PIPELINE,
    ),
]
