#include "interpreter/memory.h"

#include <algorithm>
#include <cstring>

namespace tk::interpreter {

void Memory::add(std::string name, const void* data, std::size_t bytes, bool written) {
  if (bytes == 0) return;
  const auto* begin = static_cast<const std::byte*>(data);
  for (Array& array : arrays_) {
    if (begin >= array.begin && begin + bytes <= array.begin + array.bytes) {
      if (written) std::memset(array.written.data() + (begin - array.begin), 1, bytes);
      return;
    }
  }
  arrays_.push_back({std::move(name), begin, bytes, std::vector<std::uint8_t>(bytes, written)});
}

const Memory::Array& Memory::find(const void* pointer, std::size_t bytes, const char* verb,
                                  Location at) const {
  const auto* begin = static_cast<const std::byte*>(pointer);
  const Array* nearest = nullptr;
  for (const Array& array : arrays_) {
    if (begin >= array.begin && begin + bytes <= array.begin + array.bytes) return array;
    if (begin >= array.begin && (!nearest || array.begin > nearest->begin)) nearest = &array;
  }
  std::string message = std::string(verb) + " " + std::to_string(bytes) +
                        " bytes of global memory outside of every array";
  if (nearest) {
    message += ", " + std::to_string(begin - nearest->begin) + " bytes after the start of " +
               nearest->name + ", which has " + std::to_string(nearest->bytes);
  }
  fail(FaultKind::kOutOfBounds, message, at);
}

void Memory::check_inside(const void* pointer, std::size_t bytes, Location at) const {
  if (bytes != 0) find(pointer, bytes, "touches", at);
}

void Memory::check_read(const void* pointer, std::size_t bytes, Location at) const {
  if (bytes == 0) return;
  const Array& array = find(pointer, bytes, "reads", at);
  const std::size_t first = static_cast<const std::byte*>(pointer) - array.begin;
  const void* unwritten = std::memchr(array.written.data() + first, 0, bytes);
  if (unwritten == nullptr) return;
  const auto place = static_cast<const std::uint8_t*>(unwritten) - array.written.data();
  fail(FaultKind::kGlobalUnwritten,
       "reads global memory that nobody has written: byte " + std::to_string(place) + " of " +
           array.name,
       at);
}

void Memory::mark_written(const void* pointer, std::size_t bytes, Location at) {
  if (bytes == 0) return;
  const Array& array = find(pointer, bytes, "writes", at);
  const std::size_t first = static_cast<const std::byte*>(pointer) - array.begin;
  std::memset(const_cast<Array&>(array).written.data() + first, 1, bytes);
}

}  // namespace tk::interpreter
