// Global memory: the arrays a kernel was given, and which of their bytes anybody wrote.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tk/interpreter/engine.h"

namespace tk::interpreter {

class Memory {
 public:
  // Arrays that overlap or repeat are taken once; one that anybody says is written is.
  void add(std::string name, const void* data, std::size_t bytes, bool written);

  // Fail where the bytes lie outside of every array, or, to be read, were never written.
  void check_read(const void* pointer, std::size_t bytes, Location at) const;
  void check_inside(const void* pointer, std::size_t bytes, Location at) const;
  // check_inside, and from now on the bytes can be read.
  void mark_written(const void* pointer, std::size_t bytes, Location at);

 private:
  struct Array {
    std::string name;
    const std::byte* begin;
    std::size_t bytes;
    std::vector<std::uint8_t> written;  // for each byte
  };
  const Array& find(const void* pointer, std::size_t bytes, const char* verb, Location at) const;

  std::vector<Array> arrays_;
};

}  // namespace tk::interpreter
