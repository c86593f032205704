// What warp_cuda.cu uses of a device, for the host: its steps can then be run there, for one thread after the other,
// and compared with the reference (tests/warp_steps.cpp).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#define STEP inline
#define STEP_APART inline
#define UNROLL

namespace minter {

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }

// Four bytes of the eight of `low` and `high`, chosen by the hexadecimal digits of `which`.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t all = static_cast<uint64_t>(high) << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= static_cast<uint32_t>(all >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
  return chosen;
}

// The sum of two products of 16-bit words and of the lower two bytes, and of c.
inline uint32_t __dp2a_lo(uint32_t words, uint32_t bytes, uint32_t c) {
  return (words & 65535u) * (bytes & 255u) + (words >> 16) * (bytes >> 8 & 255u) + c;
}

// The sum, rounded down: of numbers beside 2^23, where floats are the whole numbers.
inline float __fadd_rd(float a, float b) { return std::floor(a) + b; }

inline float approximate_inverse(float value) { return 1.0f / value; }

}  // namespace minter
