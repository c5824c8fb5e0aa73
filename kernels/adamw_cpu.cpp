// One step of AdamW over many tensors, in place, for what `adamw.py` defines: the same numbers as its reference, to the
// bit but for square roots, which PyTorch rounds less exactly; but each element read once and written once, on several
// threads.

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace {

using tilewright::bfloat16, tilewright::bits_of, tilewright::narrowed, tilewright::widened;

// The table of `adamw_cpu.py`, one row a tensor: the field names are those of `Slot`. What is absent is null.
struct Tensor {
  void* param;
  void* exp_avg;
  void* exp_avg_sq;
  int16_t* low_bits;
  const void* grad;
  int64_t numel;
  int64_t number;
  int64_t first;
  int64_t step;
  // Whether each is bfloat16 (else float32), in bits: param 1, grad 2, exp_avg 4, exp_avg_sq 8.
  int64_t narrow;
  float root;       // (1 − β₂ᵗ)^−½
  float step_size;  // lr / (1 − β₁ᵗ)
};

struct Rule {
  float scale, rest1, rest2, eps, decay;  // of the gradient; 1 − β₁; 1 − β₂; eps; lr · weight_decay
  int32_t stochastic;
  int64_t seed;
};

// Elements worked on together: their random bits come from 16 groups of four, side by side in vector registers.
constexpr int kBlock = 64;
constexpr int kGroups = kBlock / 4;
// Elements that a thread takes at a time.
constexpr int64_t kShare = int64_t{1} << 16;

// Up where the 16 bits cut off and 16 random bits sum to 2¹⁶ or more.
bfloat16 stochastic(float x, uint16_t random) { return static_cast<bfloat16>((bits_of(x) + random) >> 16); }

// The random bits of an element each: 16 for the parameter, 16 for the second average. Four elements' are four words of
// Philox 4×32-10, whose low halves are the former and whose high halves the latter.
struct Random {
  uint16_t for_param[kBlock], for_exp_avg_sq[kBlock];
};

// Those of the groups of four from `group` on. Words stand in 64 bits each, whose upper halves may hold anything until
// the end: so each round is made of whole vectors.
void philox(Random& random, int64_t group, const Tensor& tensor, int64_t seed) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  const uint64_t number = static_cast<uint64_t>(tensor.number) & kLow, step = static_cast<uint64_t>(tensor.step) & kLow;
  uint64_t low[kGroups], high[kGroups];  // four elements' 16 bits, the first lowest
  for (int i = 0; i < kGroups; ++i) {
    uint64_t c0 = static_cast<uint64_t>(group + i) & kLow, c1 = static_cast<uint64_t>(group + i) >> 32, c2 = number,
             c3 = step, k0 = static_cast<uint64_t>(seed) & kLow, k1 = static_cast<uint64_t>(seed) >> 32;
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = 0xD2511F53u * (c0 & kLow), b = 0xCD9E8D57u * (c2 & kLow);
      c0 = b >> 32 ^ c1 ^ k0, c1 = b, c2 = a >> 32 ^ c3 ^ k1, c3 = a;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    low[i] = (c0 & 0xFFFFu) | (c1 & 0xFFFFu) << 16 | (c2 & 0xFFFFu) << 32 | c3 << 48;
    high[i] = (c0 >> 16 & 0xFFFFu) | (c1 & 0xFFFF0000u) | (c2 & 0xFFFF0000u) << 16 | (c3 & 0xFFFF0000u) << 32;
  }
  static_assert(std::endian::native == std::endian::little);
  std::memcpy(random.for_param, low, sizeof low);
  std::memcpy(random.for_exp_avg_sq, high, sizeof high);
}

// Elements [begin, end) of the block of 64 that begins at `start`, which lies before the tensor where `first` is no
// multiple of 64.
template <typename Param, typename Grad, typename ExpAvg, typename ExpAvgSq>
inline __attribute__((always_inline)) void block(const Tensor& tensor, const Rule& rule, int64_t start, int begin,
                                                 int end) {
  const bool rounds_param = sizeof(Param) == 2 && rule.stochastic;
  Random random;
  if (rounds_param || sizeof(ExpAvgSq) == 2) philox(random, (start + tensor.first) / 4, tensor, rule.seed);
  Param* __restrict param = static_cast<Param*>(tensor.param);
  const Grad* __restrict grad = static_cast<const Grad*>(tensor.grad);
  ExpAvg* __restrict exp_avg = static_cast<ExpAvg*>(tensor.exp_avg);
  ExpAvgSq* __restrict exp_avg_sq = static_cast<ExpAvgSq*>(tensor.exp_avg_sq);
  int16_t* __restrict rest = tensor.low_bits;
  float theta[kBlock];
  if (rest) {
    for (int i = begin; i < end; ++i) {
      const uint32_t high = static_cast<uint32_t>(param[start + i]) << 16;
      theta[i] = std::bit_cast<float>(high + static_cast<uint32_t>(int32_t{rest[start + i]}));
    }
  } else {
    for (int i = begin; i < end; ++i) theta[i] = widened(param[start + i]);
  }
  for (int i = begin; i < end; ++i) {
    const float g = widened(grad[start + i]) * rule.scale;
    float m = widened(exp_avg[start + i]), v = widened(exp_avg_sq[start + i]);
    m = m + rule.rest1 * (g - m);
    v = v + rule.rest2 * (g * g - v);
    const float denominator = std::sqrt(v) * tensor.root + rule.eps;
    theta[i] = theta[i] - (tensor.step_size * (m / denominator) + rule.decay * theta[i]);
    narrowed(m, exp_avg[start + i]);
    if constexpr (sizeof(ExpAvgSq) == 2)
      exp_avg_sq[start + i] = stochastic(v, random.for_exp_avg_sq[i]);
    else
      exp_avg_sq[start + i] = v;
  }
  if constexpr (sizeof(Param) == 2) {
    if (rest) {
      for (int i = begin; i < end; ++i) {
        const uint32_t bits = bits_of(theta[i]), high = (bits + 0x8000u) >> 16;
        param[start + i] = static_cast<bfloat16>(high);
        rest[start + i] = static_cast<int16_t>(bits - (high << 16));
      }
    } else if (rounds_param) {
      for (int i = begin; i < end; ++i) param[start + i] = stochastic(theta[i], random.for_param[i]);
    } else {
      for (int i = begin; i < end; ++i) narrowed(theta[i], param[start + i]);
    }
  } else {
    for (int i = begin; i < end; ++i) param[start + i] = theta[i];
  }
}

// Elements from `from` up to `to`; both count from the tensor's start, rounded down to where a block begins.
template <typename Param, typename Grad, typename ExpAvg, typename ExpAvgSq>
void run(const Tensor& tensor, const Rule& rule, int64_t from, int64_t to) {
  for (int64_t start = from; start < to; start += kBlock) {
    const int begin = static_cast<int>(std::max<int64_t>(0, -start));
    const int end = static_cast<int>(std::min<int64_t>(kBlock, tensor.numel - start));
    // With both known the compiler makes vectors of it.
    if (begin == 0 && end == kBlock)
      block<Param, Grad, ExpAvg, ExpAvgSq>(tensor, rule, start, 0, kBlock);
    else
      block<Param, Grad, ExpAvg, ExpAvgSq>(tensor, rule, start, begin, end);
  }
}

using Run = void (*)(const Tensor&, const Rule&, int64_t, int64_t);

template <int Kind>
constexpr Run run_of() {
  using F = float;
  using B = bfloat16;
  return run<std::conditional_t<Kind & 1, B, F>, std::conditional_t<Kind & 2, B, F>, std::conditional_t<Kind & 4, B, F>,
             std::conditional_t<Kind & 8, B, F>>;
}

template <int... Kind>
constexpr auto runs_of(std::integer_sequence<int, Kind...>) {
  return std::array<Run, sizeof...(Kind)>{run_of<Kind>()...};
}

}  // namespace

extern "C" void tilewright_adamw(const Tensor* tensors, int64_t count, const Rule* rule, int threads) {
  static constexpr auto kRuns = runs_of(std::make_integer_sequence<int, 16>{});
  struct Share {
    const Tensor* tensor;
    int64_t from, to;
  };
  std::vector<Share> shares;
  for (const Tensor* tensor = tensors; tensor != tensors + count; ++tensor)
    for (int64_t from = -(tensor->first % kBlock); from < tensor->numel; from += kShare)
      shares.push_back({tensor, from, std::min(from + kShare, tensor->numel)});
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (size_t i = 0; i < shares.size(); ++i)
    kRuns[shares[i].tensor->narrow](*shares[i].tensor, *rule, shares[i].from, shares[i].to);
}
