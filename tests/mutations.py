"""Ways to break the kernels, each of which the interpreter must notice.

A mutation replaces a text of a kernel, of the block template or of a pipeline, once.
``python -m tests.mutate`` applies each in turn, and writes the table in
docs/interpreter.md.
"""

from __future__ import annotations

from tests import (
    mutations_attention_backward,
    mutations_attention_forward,
    mutations_attention_wide,
    mutations_matmul,
    mutations_pipeline,
)

MUTATIONS = [
    *mutations_attention_forward.MUTATIONS,
    *mutations_attention_backward.MUTATIONS,
    *mutations_attention_wide.MUTATIONS,
    *mutations_matmul.MUTATIONS,
    *mutations_pipeline.MUTATIONS,
]
