// The arrays of an attention call and its exact results.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels/attention/attention.h"
#include "tests/interpreter/harness.h"

namespace tk::check {

// Offsets that hide nothing.
constexpr int kNoFirst = -(1 << 20), kNoLast = 1 << 20;

struct Attention {
  int batch, seqlen_q, seqlen_kv, num_heads, num_kv_heads, head_dim;
  int first_offset, last_offset;  // query i sees keys from i + first_offset to i + last_offset
  int other_head_dim_v = 0;       // where v's is not head_dim

  int head_dim_v() const { return other_head_dim_v == 0 ? head_dim : other_head_dim_v; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
  std::size_t q_size() const {
    return static_cast<std::size_t>(batch) * seqlen_q * num_heads * head_dim;
  }
  std::size_t kv_size() const {
    return static_cast<std::size_t>(batch) * seqlen_kv * num_kv_heads * head_dim;
  }
  std::size_t rows() const { return static_cast<std::size_t>(batch) * seqlen_q * num_heads; }
  std::size_t out_size() const { return rows() * head_dim_v(); }
  std::size_t v_size() const {
    return static_cast<std::size_t>(batch) * seqlen_kv * num_kv_heads * head_dim_v();
  }
};

// The head dim follows from the array's size.
template <typename Array>
TensorMap rows_map(Array& array, const Attention& s, bool of_queries, int rows) {
  const std::int64_t length = of_queries ? s.seqlen_q : s.seqlen_kv;
  const std::int64_t heads = of_queries ? s.num_heads : s.num_kv_heads;
  const std::int64_t head_dim =
      static_cast<std::int64_t>(array.size()) / (s.batch * length * heads);
  const std::int64_t row = head_dim * 2;
  return map_of(array.data(), {head_dim, length, heads, s.batch},
                {heads * row, row, length * heads * row}, {64, rows, 1, 1});
}

struct ExactAttention {
  std::vector<double> out, lse, dq, dk, dv;
};

// The definition in double precision; gradients where dout is given.
template <typename T>
ExactAttention exact_attention(const Attention& s, const Array<T>& q, const Array<T>& k,
                               const Array<T>& v, const Array<T>* dout, const Array<float>* dlse) {
  ExactAttention r{std::vector<double>(s.out_size()), std::vector<double>(s.rows()),
                   std::vector<double>(s.q_size()), std::vector<double>(s.kv_size()),
                   std::vector<double>(s.v_size())};
  const int group = s.num_heads / s.num_kv_heads, depth = s.head_dim, depth_v = s.head_dim_v();
  std::vector<double> p(s.seqlen_kv), dp(s.seqlen_kv);
  for (int b = 0; b < s.batch; ++b) {
    for (int h = 0; h < s.num_heads; ++h) {
      for (int i = 0; i < s.seqlen_q; ++i) {
        const std::size_t row = (static_cast<std::size_t>(b) * s.seqlen_q + i) * s.num_heads + h;
        const auto key_row = [&](int j) {
          return (static_cast<std::size_t>(b) * s.seqlen_kv + j) * s.num_kv_heads + h / group;
        };
        const auto key = [&](int j) { return key_row(j) * depth; };
        const auto value = [&](int j) { return key_row(j) * depth_v; };
        const int first = std::clamp(i + s.first_offset, 0, s.seqlen_kv);
        const int end = std::max(first, std::clamp(i + s.last_offset + 1, 0, s.seqlen_kv));
        double top = -std::numeric_limits<double>::infinity(), sum = 0;
        for (int j = first; j < end; ++j) {
          p[j] = 0;
          for (int d = 0; d < depth; ++d) p[j] += double(q[row * depth + d]) * k[key(j) + d];
          p[j] *= s.scale();
          top = std::max(top, p[j]);
        }
        for (int j = first; j < end; ++j) sum += std::exp(p[j] - top);
        r.lse[row] = first == end ? top : top + std::log(sum);
        for (int j = first; j < end; ++j) {
          p[j] = std::exp(p[j] - r.lse[row]);
          for (int d = 0; d < depth_v; ++d) r.out[row * depth_v + d] += p[j] * v[value(j) + d];
        }
        if (dout == nullptr) continue;
        double delta = -(*dlse)[row];
        for (int d = 0; d < depth_v; ++d) {
          delta += r.out[row * depth_v + d] * (*dout)[row * depth_v + d];
        }
        for (int j = first; j < end; ++j) {
          double dp_j = 0;
          for (int d = 0; d < depth_v; ++d) {
            dp_j += double((*dout)[row * depth_v + d]) * v[value(j) + d];
            r.dv[value(j) + d] += p[j] * (*dout)[row * depth_v + d];
          }
          const double ds = p[j] * (dp_j - delta) * s.scale();
          for (int d = 0; d < depth; ++d) {
            r.dq[row * depth + d] += ds * k[key(j) + d];
            r.dk[key(j) + d] += ds * q[row * depth + d];
          }
        }
      }
    }
  }
  return r;
}

}  // namespace tk::check
