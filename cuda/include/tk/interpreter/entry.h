// What makes a kernel's source, compiled by the host's compiler with TK_INTERPRETER defined, a
// library that the interpreter can run: TK_INTERPRETER_ENTRY(name, (Params), (kernel<...>)).
//
// The engine's functions stay undefined in it; the process that loads it has them.
#pragma once

#include "tk/interpreter/engine.h"

#define TK_INTERPRETER_UNWRAP(...) __VA_ARGS__
#define TK_INTERPRETER_ENTRY(name, params_type, function)                           \
  extern "C" __attribute__((visibility("default"))) void name(const void* params) { \
    TK_INTERPRETER_UNWRAP function(                                                 \
        *static_cast<const TK_INTERPRETER_UNWRAP params_type*>(params));            \
  }
