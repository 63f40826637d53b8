"""What both builds compile: CMakeLists.txt reads these lists too.

Only lists of paths below this folder, one a line.
"""

# The handlers of the ops, and the kernels that they choose: compiled once, linked into both modules.
OP_SOURCES = [
    "ffi/attention_backward.cc",
    "ffi/attention_bias.cc",
    "ffi/attention_extras.cc",
    "ffi/attention_forward.cc",
    "ffi/attention_kernels.cc",
    "ffi/attention_problem.cc",
    "ffi/based_attention_chunks.cc",
    "ffi/based_attention_kernels.cc",
    "ffi/based_attention_problem.cc",
    "ffi/based_attention_walked_gradients.cc",
    "ffi/based_attention_walks.cc",
    "ffi/ffi_util.cc",
    "ffi/hedgehog_attention_backward.cc",
    "ffi/hedgehog_attention_documents.cc",
    "ffi/hedgehog_attention_forward.cc",
    "ffi/hedgehog_attention_kernels.cc",
    "ffi/hedgehog_attention_problem.cc",
    "ffi/hedgehog_attention_step.cc",
    "ffi/kernel.cc",
    "ffi/linear_attention_gates.cc",
    "ffi/linear_attention_gradients.cc",
    "ffi/linear_attention_kernels.cc",
    "ffi/linear_attention_problem.cc",
    "ffi/linear_attention_segments.cc",
    "ffi/linear_attention_steps.cc",
    "ffi/linear_attention_walks.cc",
    "ffi/matmul.cc",
    "ffi/matmul_kernels.cc",
    "ffi/state_step.cc",
    "ffi/state_step_kernels.cc",
]

# What a specialisation is, and where compiled ones are kept, without anything that runs them.
SPEC_SOURCES = [
    "runtime/kernel_cache.cc",
    "runtime/kernel_spec.cc",
    "runtime/settings.cc",
    "runtime/sha256.cc",
]

# Compiles, finds and launches kernels.
RUNTIME_SOURCES = [
    "runtime/compile.cc",
    "runtime/driver.cc",
    "runtime/kernel.cc",
    "runtime/launch.cc",
    "runtime/nvrtc.cc",
    "runtime/tensor_map.cc",
]

# The Python module _extension: these, and those of the ops, the specialisations and the runtime.
EXTENSION_SOURCES = [
    "ffi/gpu.cc",
    "ffi/module.cc",
]

# The headers among the device sources that these include: the extension knows with which it was built.
HOST_HEADERS = [
    "include/tk/kernel_params.h",
    "include/tk/product_columns.h",
    "include/tk/tensor_map.h",
    "kernels/attention/attention.h",
    "kernels/attention/sections.h",
    "kernels/based_attention/based_attention.h",
    "kernels/hedgehog_attention/hedgehog_attention.h",
    "kernels/linear_attention/linear_attention.h",
    "kernels/matmul/matmul.h",
    "kernels/state_step/state_step.h",
]

# The interpreter itself, which knows no op.
INTERPRETER_SOURCES = [
    "interpreter/accesses.cc",
    "interpreter/barriers.cc",
    "interpreter/clock.cc",
    "interpreter/copies.cc",
    "interpreter/crew.cc",
    "interpreter/current.cc",
    "interpreter/fiber.cc",
    "interpreter/grid.cc",
    "interpreter/machine.cc",
    "interpreter/memory.cc",
    "interpreter/registry.cc",
    "interpreter/report.cc",
    "interpreter/shadow.cc",
    "interpreter/tensor_map.cc",
]

# The Python module _interpreter: these, and those of the ops, the specialisations and the interpreter.
INTERPRETER_MODULE_SOURCES = [
    "interpreter/ffi/compile.cc",
    "interpreter/ffi/module.cc",
    "interpreter/ffi/runtime.cc",
    "interpreter/kernels/attention_backward.cc",
    "interpreter/kernels/attention_forward.cc",
    "interpreter/kernels/matmul.cc",
]
