// Runs matmul in the interpreter on a few shapes, tails in every dimension included.
#include "interpreter/launch.h"
#include "kernels/matmul/kernel.cuh"
#include "tests/interpreter/harness.h"

namespace tk::check {
namespace {

struct Shape {
  int m, n, k, batch;
};

template <bool kTransposeA, bool kTransposeB, int kClusterM>
std::string check_matmul(const Shape& s, int blocks, std::uint64_t seed) {
  constexpr matmul::Config kConfig = {128, 128, 64, 2, kClusterM, 2};
  using Traits = matmul::Traits<bf16, kTransposeA, kTransposeB, 128, 128, 64, 2, kClusterM, 2>;
  Array<bf16> a("a", s.batch * s.m * s.k), b("b", s.batch * s.k * s.n), c("c", s.batch * s.m * s.n);
  a.fill_normal(1);
  b.fill_normal(2);
  const auto map = [&](Array<bf16>& array, std::int64_t rows, std::int64_t cols,
                       std::int64_t rows_in_box) {
    return map_of(array.data(), {cols, rows, s.batch}, {cols * 2, rows * cols * 2},
                  {64, rows_in_box, 1});
  };
  matmul::Params params = {};
  params.a = kTransposeA ? map(a, s.k, s.m, 64) : map(a, s.m, s.k, 128);
  params.b = kTransposeB ? map(b, s.n, s.k, 128 / kClusterM) : map(b, s.k, s.n, 64);
  params.c = map(c, s.m, s.n, 64);
  params.m = s.m;
  params.n = s.n;
  params.k = s.k;
  params.batch = params.batch_a = params.batch_b = s.batch;

  interpreter::Memory memory;
  a.give(memory, true);
  b.give(memory, true);
  c.give(memory, false);
  interpreter::Launch launch = {};
  launch.kernel = "tk_matmul";
  launch.entry = entry<matmul::multiply<Traits>, matmul::Params>;
  launch.params = &params;
  launch.grid[0] = blocks;
  launch.threads = matmul::kThreads;
  launch.shared_bytes = matmul::shared_bytes(kConfig);
  launch.cluster_size = kClusterM;
  launch.seed = seed;
  if (const auto report = interpreter::run(launch, memory)) return report->text();

  std::vector<double> exact(c.size());
  for (int batch = 0; batch < s.batch; ++batch) {
    for (int i = 0; i < s.m; ++i) {
      for (int j = 0; j < s.n; ++j) {
        double sum = 0;
        for (int l = 0; l < s.k; ++l) {
          const int at_a = kTransposeA ? l * s.m + i : i * s.k + l;
          const int at_b = kTransposeB ? j * s.k + l : l * s.n + j;
          sum += static_cast<double>(a[batch * s.m * s.k + at_a]) * b[batch * s.k * s.n + at_b];
        }
        exact[(batch * s.m + i) * s.n + j] = sum;
      }
    }
  }
  return compare(c, exact, 0.005);
}

std::string check_all(std::uint64_t seed) {
  std::string wrong = check_matmul<false, false, 1>({136, 144, 200, 1}, 2, seed);
  if (wrong.empty()) wrong = check_matmul<true, true, 2>({136, 136, 136, 2}, 4, seed);
  if (wrong.empty()) wrong = check_matmul<false, true, 1>({72, 200, 320, 2}, 1, seed);
  return wrong;
}

}  // namespace
}  // namespace tk::check

int main(int argc, char** argv) { return tk::check::explore(argc, argv, tk::check::check_all); }
