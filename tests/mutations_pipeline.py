"""Ways to break pipelines and the block template, seen in a kernel made of them."""

from tests.mutation import Mutation

_PIPELINE = "include/tk/pipeline.cuh"
_BLOCK = "include/tk/block.cuh"


def _in_matmul(what, old, new="", after="", *, file):
    return Mutation(what, "matmul", file, old, new, after)


def _in_backward(what, old, new="", after="", *, file):
    return Mutation(what, "attention_backward", file, old, new, after)


def _in_forward(what, old, new="", after="", *, file):
    return Mutation(what, "attention_forward", file, old, new, after)


MUTATIONS = [
    _in_matmul(
        "the producer waits for the wrong phase",
        "wait(state.phase ^ 1, at);",
        "wait(state.phase, at);",
        file=_PIPELINE,
    ),
    _in_matmul(
        "the producer does not wait for a free stage",
        "empty_[state.stage].wait(state.phase ^ 1, at);",
        file=_PIPELINE,
    ),
    _in_matmul("the phase never changes", "phase ^= 1;", file=_PIPELINE),
    _in_matmul(
        "a ring one stage too long",
        "++stage == kStages",
        "++stage == kStages + 1",
        file=_PIPELINE,
    ),
    _in_matmul(
        "all lanes release a stage",
        "if (warp::leader()) empty_",
        "empty_",
        file=_PIPELINE,
    ),
    _in_matmul(
        "two arrivals expected of one producer",
        "full_[i].init(1, at);",
        "full_[i].init(2, at);",
        file=_PIPELINE,
    ),
    _in_backward(
        "dq filled without a fence",
        "publish_shared(at);",
        after="struct StorePipeline",
        file=_PIPELINE,
    ),
    _in_backward(
        "a stage of dq filled too early",
        "empty_[state.stage].wait(state.phase ^ 1, at);",
        after="struct StorePipeline",
        file=_PIPELINE,
    ),
    _in_backward(
        "all lanes announce a stage of dq",
        "if (warp::leader()) full_",
        "full_",
        file=_PIPELINE,
    ),
    _in_forward("barriers are not published", "publish_barriers();", file=_BLOCK),
    _in_forward(
        "roles start before barriers are there",
        "} else {\n    sync();\n  }",
        "}",
        file=_BLOCK,
    ),
    _in_matmul(
        "a block exits while the other still releases to it",
        "cluster::sync();",
        after="warp::sync();",
        file=_BLOCK,
    ),
]
