// SHA-256 (FIPS 180-4), for naming and checking cache entries.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tk::runtime {

class Sha256 {
 public:
  void update(std::string_view bytes);

  // Adds the length before the bytes, so that ("ab", "c") and ("a", "bc") differ.
  void update_field(std::string_view bytes);

  // The digest as 64 hexadecimal digits. The object is finished afterwards.
  std::string hex_digest();

 private:
  void compress(const unsigned char* block);

  std::array<std::uint32_t, 8> state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<unsigned char, 64> pending_ = {};
  std::size_t pending_size_ = 0;
  std::uint64_t total_bytes_ = 0;
};

std::string sha256_hex(std::string_view bytes);

}  // namespace tk::runtime
