// What the C++ of this folder shares: bfloat16 numbers as their bits, and a softmax's parts, of which compilers make
// vectors.

#pragma once

#include <bit>
#include <cstdint>
#include <limits>

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

// exp(x) within 2 units in the last place for x from −87 up to 88; below, where float32 has few digits left, 0; above,
// where it ends, infinity.
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
  const float bounded = x > 88.0f ? std::numeric_limits<float>::infinity() : series * power;
  return x < -87.0f ? 0.0f : bounded;
}

// Sums and maxima of a row are taken in so many lanes side by side, brought together by halves at the end: whole vectors
// throughout, and an error that grows with a lane's share of the row alone.
constexpr int kLanes = 64;

inline float sum_of(float (&lanes)[kLanes]) {
#pragma GCC unroll 6
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Numbers that are none are passed over.
inline float larger(float x, float y) { return y > x ? y : x; }

inline float largest_of(float (&lanes)[kLanes]) {
#pragma GCC unroll 6
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = larger(lanes[i], lanes[i + half]);
  return lanes[0];
}

// The largest of a row, −∞ of none.
template <typename T>
float largest_of(const T* row, int64_t count) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -std::numeric_limits<float>::infinity();
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t start = 0; start < whole; start += kLanes)
    for (int i = 0; i < kLanes; ++i) lanes[i] = larger(lanes[i], widened(row[start + i]));
  for (int64_t j = whole; j < count; ++j) lanes[0] = larger(lanes[0], widened(row[j]));
  return largest_of(lanes);
}

// exp(x − top) of a row; returns their sum.
template <typename T>
float exponentials_of(const T* row, int64_t count, float top, float* exponentials) {
  float lanes[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t start = 0; start < whole; start += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const float e = exp_of(widened(row[start + i]) - top);
      exponentials[start + i] = e;
      lanes[i] += e;
    }
  for (int64_t j = whole; j < count; ++j) lanes[0] += exponentials[j] = exp_of(widened(row[j]) - top);
  return sum_of(lanes);
}

}  // namespace tilewright
