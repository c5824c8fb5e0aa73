// What the C++ of this folder shares: bfloat16 numbers as their bits, and an exponential that compilers make vectors of.

#pragma once

#include <bit>
#include <cstdint>

namespace tilewright {

using bfloat16 = uint16_t;

inline float widened(bfloat16 x) { return std::bit_cast<float>(uint32_t{x} << 16); }
inline float widened(float x) { return x; }

// One pattern for every NaN: rounding could turn another into a number.
inline uint32_t bits_of(float x) { return x == x ? std::bit_cast<uint32_t>(x) : 0x7FC00000u; }

// To the nearest, ties to even.
inline void narrowed(float x, bfloat16& result) {
  const uint32_t bits = bits_of(x);
  result = static_cast<bfloat16>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline void narrowed(float x, float& result) { result = x; }

// exp(x) within 2 units in the last place for x from −87 up to 88; below, where float32 has few digits left, 0.
//
// x = n · log 2 + r with a whole n; exp(r) is its Taylor series, of which the first term left out is below 2⁻²⁷ as
// |r| ≤ ½ log 2. log 2 is subtracted in two parts, the first of so few digits that its product with n is exact.
inline float exp_of(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 · 2²³: added to a number below 2²² in size, it leaves no fraction
  const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 127u) << 23);  // 2ⁿ
  return x < -87.0f ? 0.0f : series * power;
}

}  // namespace tilewright
