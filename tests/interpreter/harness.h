// What the programs that run kernels in the interpreter share: arrays, random values, exact results
// to compare with, and the loop over schedules.
//
// Such a program prints "ok" and how many schedules it ran, or the first fault or wrong result with
// its seed. It takes the first seed and the number of schedules.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "interpreter/launch.h"
#include "interpreter/tensor_map.h"
#include "tk/interpreter/convert.h"

namespace tk::check {

// An array of 16-byte aligned elements, all bits set until somebody writes them: NaN.
template <typename T>
class Array {
 public:
  Array(std::string name, std::size_t size) : name_(std::move(name)), size_(size) {
    const std::size_t bytes = (size * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    std::memset(static_cast<void*>(data_), 0xff, bytes);
  }
  ~Array() { std::free(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() { return data_; }
  std::size_t size() const { return size_; }
  float operator[](std::size_t i) const { return interpreter::to_float(data_[i]); }
  void fill_normal(std::uint64_t seed, float gain = 1.0f) {
    std::mt19937_64 engine(seed);
    std::normal_distribution<float> normal;
    for (std::size_t i = 0; i < size_; ++i)
      data_[i] = interpreter::from_float<T>(gain * normal(engine));
  }
  void give(interpreter::Memory& memory, bool written) const {
    memory.add(name_, data_, size_ * sizeof(T), written);
  }
  const std::string& name() const { return name_; }

 private:
  std::string name_;
  std::size_t size_;
  T* data_;
};

inline TensorMap map_of(void* data, std::vector<std::int64_t> dims,
                        std::vector<std::int64_t> strides, std::vector<std::int64_t> box) {
  TensorMap map = {};
  const std::string problem =
      interpreter::encode(&map, data, interpreter::ElementType::kBFloat16, dims, strides, box, 128);
  if (!problem.empty()) {
    std::printf("wrong tensor map: %s\n", problem.c_str());
    std::exit(2);
  }
  return map;
}

// What is wrong with a result, or nothing. `scale` is the size of what was rounded on the way.
template <typename T>
std::string compare(const Array<T>& got, const std::vector<double>& exact, double tolerance) {
  double largest = 0;
  for (const double x : exact) {
    if (std::isfinite(x)) largest = std::max(largest, std::fabs(x));
  }
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const double x = got[i];
    const bool same =
        std::isfinite(exact[i]) ? std::fabs(x - exact[i]) <= tolerance * largest : x == exact[i];
    if (!same) {
      char text[200];
      std::snprintf(text, sizeof(text), "wrong %s[%zu]: %g instead of %g", got.name().c_str(), i, x,
                    exact[i]);
      return text;
    }
  }
  return "";
}

template <auto kFunction, typename Params>
void entry(const void* params) {
  kFunction(*static_cast<const Params*>(params));
}

// Runs `check` for every seed; it returns what is wrong.
template <typename Check>
int explore(int argc, char** argv, Check&& check) {
  const std::uint64_t first = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const std::uint64_t count = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  for (std::uint64_t seed = first; seed < first + count; ++seed) {
    const std::string wrong = check(seed);
    if (wrong.empty()) continue;
    std::printf("%llu %s\n", static_cast<unsigned long long>(seed), wrong.c_str());
    return 1;
  }
  std::printf("ok %llu schedules\n", static_cast<unsigned long long>(count));
  return 0;
}

}  // namespace tk::check
