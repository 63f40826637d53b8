// Where in a kernel an operation stands: the last parameter of operations, never given by kernels.
//
// The interpreter names it in its reports. On the GPU it is empty and costs nothing.
#pragma once

namespace tk {

#ifdef TK_INTERPRETER
struct Location {
  const char* file;
  int line;
  constexpr Location(const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : file(file), line(line) {}
};
#else
struct Location {};
#endif

}  // namespace tk
