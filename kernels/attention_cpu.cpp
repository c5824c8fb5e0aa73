// Packed attention in bfloat16 on a processor that multiplies pairs of bfloat16 numbers (AVX-512 BF16), after
// FlashAttention-2 (Dao 2023, arXiv:2307.08691): scores exist for a block of queries and keys at a time, in float32 and
// in the cache.
//
// The processor's product of pairs adds x₀ y₀ + x₁ y₁ to each of 16 sums: one operand of a matrix product lies as rows
// of pairs, of which each is spread over all lanes, and the other as panels of 64 columns, in each of which the pair of a
// row and the next one stand together. What the functions here rearrange is put into one of these two forms.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "vectors.h"

namespace {

using tilewright::bfloat16, tilewright::narrowed, tilewright::widened;

using Pair = uint32_t;  // two bfloat16 numbers, the first in the lower half

constexpr int kPanel = 64;  // columns
constexpr int kRows = 4;    // of which a panel's sums stay in registers
constexpr int kQueries = 64, kKeys = 128;  // of a block
constexpr float kInfinity = std::numeric_limits<float>::infinity();
static_assert(kQueries == kPanel && kKeys == 2 * kPanel);

Pair pair_of(bfloat16 first, bfloat16 second) { return Pair{first} | Pair{second} << 16; }
Pair pair_of(float first, float second) {
  bfloat16 x, y;
  narrowed(first, x), narrowed(second, y);
  return pair_of(x, y);
}

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// A head of one document: numbers of a token lie beside each other, tokens `stride` apart.
struct Head {
  bfloat16* data;
  int64_t stride;
  bfloat16* token(int64_t i) const { return data + i * stride; }
  // Ask for a token soon needed: one lies too far from the next for the processor to foresee.
  void fetch(int64_t i, int64_t dim) const {
    for (int64_t d = 0; d < dim; d += 32) __builtin_prefetch(token(i) + d);
  }
};

// So many tokens ahead.
constexpr int kAhead = 12;

// Tokens [begin, end) of `x` as rows of pairs, zeros up to `rows`.
void rows_of_pairs(const Head& x, int64_t begin, int64_t end, int64_t rows, int64_t dim, Pair* out) {
  for (int64_t i = begin; i < end; ++i, out += dim / 2) {
    x.fetch(i + kAhead, dim);
    std::memcpy(out, x.token(i), dim * sizeof(bfloat16));
  }
  std::fill_n(out, (rows - (end - begin)) * dim / 2, Pair{0});
}

// Likewise, but transposed: (dim, rows / 2), each of pairs of tokens.
void columns_of_pairs(const Head& x, int64_t begin, int64_t end, int64_t rows, int64_t dim, Pair* out) {
  for (int64_t i = begin; i < begin + rows; i += 2, ++out)
    for (int64_t d = 0; d < dim; d += 16) {
      Pair pairs[16] = {};
      if (i + 1 < end)
        for (int j = 0; j < 16; ++j) pairs[j] = pair_of(x.token(i)[d + j], x.token(i + 1)[d + j]);
      else if (i < end)
        for (int j = 0; j < 16; ++j) pairs[j] = x.token(i)[d + j];
      for (int j = 0; j < 16; ++j) out[(d + j) * (rows / 2)] = pairs[j];
    }
}

// Panels of tokens as columns, `dim` rows in pairs: (tokens / 64, dim / 2, 64), zeros up to `tokens`.
void panels_of_tokens(const Head& x, int64_t begin, int64_t end, int64_t tokens, int64_t dim, Pair* out) {
  for (int64_t i = 0; i < tokens; ++i) {
    x.fetch(begin + i + kAhead, dim);
    Pair* column = out + i / kPanel * kPanel * (dim / 2) + i % kPanel;
    for (int64_t d = 0; d < dim / 2; ++d, column += kPanel) {
      *column = 0;
      if (begin + i < end) std::memcpy(column, x.token(begin + i) + 2 * d, sizeof(Pair));
    }
  }
}

// Panels of `dim` columns, tokens as rows in pairs: (dim / 64, tokens / 2, 64), zeros up to `tokens`; the last panel is
// narrower inside where dim is no multiple of 64.
void panels_of_dims(const Head& x, int64_t begin, int64_t end, int64_t tokens, int64_t dim, Pair* out) {
  for (int64_t first = 0; first < dim; first += kPanel)
    for (int64_t i = begin; i < begin + tokens; i += 2, out += kPanel) {
      x.fetch(i + kAhead, dim), x.fetch(i + kAhead + 1, dim);
      const int64_t width = std::min<int64_t>(kPanel, dim - first);
      if (i + 1 < end)
        for (int64_t d = 0; d < width; ++d) out[d] = pair_of(x.token(i)[first + d], x.token(i + 1)[first + d]);
      else
        for (int64_t d = 0; d < width; ++d) out[d] = i < end ? Pair{x.token(i)[first + d]} : Pair{0};
    }
}

// c (4, 16 · vectors) is, or has added, a (4, pairs) · b (pairs, 16 · vectors of 64).
template <int Vectors>
inline void tile(const Pair* a, int64_t a_stride, const Pair* b, int64_t pairs, float* c, int64_t c_stride, bool adds) {
  __m512 sums[kRows][Vectors];
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      sums[row][v] = adds ? _mm512_loadu_ps(c + row * c_stride + 16 * v) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh columns[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) columns[v] = (__m512bh)_mm512_load_si512(b + k * kPanel + 16 * v);
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      const __m512bh spread = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[row * a_stride + k]));
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[row][v] = _mm512_dpbf16_ps(sums[row][v], spread, columns[v]);
    }
  }
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + row * c_stride + 16 * v, sums[row][v]);
}

// What of a product matters for four rows: the first columns of the result, and pairs of the sums.
struct Part {
  int64_t columns, pairs;
};

// c (rows, columns) is, or has added, a (rows, pairs) · b, of which `panel` numbers are a panel: whole fours of rows,
// whole sixteens of columns. `part_of` a row is what is computed of it and the next three.
template <typename PartOf>
void product(const Pair* a, int64_t a_stride, const Pair* b, int64_t panel, int64_t rows, int64_t columns,
             const PartOf& part_of, float* c, int64_t c_stride, bool adds) {
  for (int64_t column = 0; column < columns; column += kPanel, b += panel)
    for (int64_t row = 0; row < rows; row += kRows) {
      const Part part = part_of(row);
      const Pair* of_row = a + row * a_stride;
      float* to = c + row * c_stride + column;
      switch (std::clamp<int64_t>((part.columns - column + 15) / 16, 0, kPanel / 16)) {
        case 4: tile<4>(of_row, a_stride, b, part.pairs, to, c_stride, adds); break;
        case 3: tile<3>(of_row, a_stride, b, part.pairs, to, c_stride, adds); break;
        case 2: tile<2>(of_row, a_stride, b, part.pairs, to, c_stride, adds); break;
        case 1: tile<1>(of_row, a_stride, b, part.pairs, to, c_stride, adds);
      }
    }
}

// exp(x) within 2 units in the last place where x is at most 0, but 0 below about −103; after `exp_of` of a number, with
// what this processor has for 2ⁿ.
inline __m512 exp_of(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // the second where one is no number
  const __m512 n = _mm512_roundscale_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  __m512 series = _mm512_set1_ps(1.0f / 5040);
  for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
  return _mm512_scalef_ps(series, n);
}

// Of 16 columns from `first` on, those that a row has that ends before `end`.
inline __mmask16 columns_before(int64_t end, int first) {
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_cmplt_epi32_mask(places, _mm512_set1_epi32(static_cast<int>(end) - first));
}

inline __m512i pairs_of(__m256bh first, __m256bh second) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)first), high = _mm512_cvtepu16_epi32((__m256i)second);
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Memory for a thread, in lines of the cache.
class Room {
 public:
  template <typename T>
  T* take(int64_t count) {
    parts_[used_].reset(::operator new(count * sizeof(T), kLine));
    return static_cast<T*>(parts_[used_++].get());
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(void* part) const { ::operator delete(part, kLine); }
  };
  std::unique_ptr<void, Free> parts_[20];
  int used_ = 0;
};

// The keys from `key` on that queries before `end` see, in whole panels.
int64_t width_of(int64_t key, int64_t end) { return std::min<int64_t>(kKeys, round_up(end - key, kPanel)); }

struct Forward {
  int64_t longest, dim;
  bool causal;
  float scale;
  Room room{};
  Pair* keys = room.take<Pair>(round_up(longest, kKeys) * dim / 2);
  Pair* values = room.take<Pair>(round_up(longest, kKeys) / 2 * round_up(dim, kPanel));
  Pair* queries = room.take<Pair>(kQueries * dim / 2);
  float* scores = room.take<float>(kQueries * kKeys);
  bfloat16* weights = room.take<bfloat16>(kQueries * kKeys);
  float* sums = room.take<float>(kQueries * dim);
  float* top = room.take<float>(kQueries);
  float* total = room.take<float>(kQueries);

  void take_keys(const Head& k, const Head& v, int64_t length) {
    panels_of_tokens(k, 0, length, round_up(length, kKeys), dim, keys);
    panels_of_dims(v, 0, length, round_up(length, kKeys), dim, values);
  }

  // The weights of a row of scores, of which the first `seen` count, and what they change in the row's sums so far.
  template <int Vectors>
  void weigh(int64_t row, int64_t seen) {
    __m512 s[Vectors], most = _mm512_set1_ps(top[row]), sum = _mm512_setzero_ps();
    for (int v = 0; v < Vectors; ++v) {
      const __m512 scaled = _mm512_load_ps(scores + row * kKeys + 16 * v) * scale;
      s[v] = _mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), columns_before(seen, 16 * v), scaled);
      most = _mm512_max_ps(s[v], most);  // the second where one is no number
    }
    const float larger = _mm512_reduce_max_ps(most);
    for (int v = 0; v < Vectors; ++v) {
      const __m512 e = exp_of(s[v] - larger);
      sum += e;
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights + row * kKeys + 16 * v), (__m256i)_mm512_cvtneps_pbh(e));
    }
    const float rest = tilewright::exp_of(top[row] - larger);
    total[row] = total[row] * rest + _mm512_reduce_add_ps(sum);
    top[row] = larger;
    if (rest != 1.0f)
      for (int64_t d = 0; d < dim; ++d) sums[row * dim + d] *= rest;
  }

  void run(const Head& q, int64_t length, const Head& out, float* lse) {
    for (int64_t first = 0; first < length; first += kQueries) {
      const int64_t count = std::min<int64_t>(kQueries, length - first), rows = round_up(count, kRows);
      rows_of_pairs(q, first, first + count, rows, dim, queries);
      std::fill_n(top, rows, -kInfinity);
      std::fill_n(total, rows, 0.0f);
      std::fill_n(sums, rows * dim, 0.0f);
      const int64_t end = causal ? first + count : length;
      for (int64_t key = 0; key < end; key += kKeys) {
        const int64_t width = width_of(key, end);
        const auto seen = [&](int64_t row) { return (causal ? first + std::min(row, count - 1) + 1 : length) - key; };
        const auto columns = [&](int64_t row) { return Part{std::min(width, seen(row + kRows - 1)), dim / 2}; };
        product(queries, dim / 2, keys + key * dim / 2, kPanel * dim / 2, rows, width, columns, scores, kKeys, false);
        for (int64_t row = 0; row < rows; ++row)
          width == kKeys ? weigh<kKeys / 16>(row, seen(row)) : weigh<kPanel / 16>(row, seen(row));
        const auto pairs = [&](int64_t row) { return Part{dim, (columns(row).columns + 1) / 2}; };
        product(reinterpret_cast<const Pair*>(weights), kKeys / 2, values + key / 2 * kPanel,
                round_up(length, kKeys) / 2 * kPanel, rows, dim, pairs, sums, dim, true);
      }
      for (int64_t row = 0; row < count; ++row) {
        bfloat16* to = out.token(first + row);
        const float inverse = 1.0f / total[row];
        for (int64_t d = 0; d < dim; ++d) narrowed(sums[row * dim + d] * inverse, to[d]);
        lse[first + row] = top[row] + std::log(total[row]);
      }
    }
  }
};

struct Backward {
  int64_t longest, dim;
  bool causal;
  float scale;
  int64_t group;
  Room room{};
  int64_t most = round_up(longest, kQueries);
  // Of each of the group's query heads, one after the other.
  Pair* queries = room.take<Pair>(group * most * dim / 2);
  Pair* upstream = room.take<Pair>(group * most * dim / 2);
  Pair* query_columns = room.take<Pair>(group * most * dim / 2);
  Pair* upstream_columns = room.take<Pair>(group * most * dim / 2);
  float* delta = room.take<float>(group * most);
  float* lse = room.take<float>(group * most);
  float* dq = room.take<float>(group * most * dim);
  // Of a block of keys.
  Pair* keys = room.take<Pair>(kKeys * dim / 2);
  Pair* values = room.take<Pair>(kKeys * dim / 2);
  Pair* key_rows = room.take<Pair>(kKeys / 2 * round_up(dim, kPanel));
  float* dk = room.take<float>(dim * kKeys);
  float* dv = room.take<float>(dim * kKeys);
  // Of a block of queries and keys: the latter two as panels of keys, and the last as rows of pairs of keys too.
  float* scores = room.take<float>(kQueries * kKeys);
  float* products = room.take<float>(kQueries * kKeys);
  Pair* weights = room.take<Pair>(kQueries / 2 * kKeys);
  Pair* dscores = room.take<Pair>(kQueries / 2 * kKeys);
  bfloat16* dscore_rows = room.take<bfloat16>(kQueries * kKeys);

  void take_queries(int64_t member, const Head& q, const Head& dout, const Head& out, const float* log_sums,
                    int64_t length) {
    const int64_t at = member * most;
    rows_of_pairs(q, 0, length, round_up(length, kQueries), dim, queries + at * dim / 2);
    rows_of_pairs(dout, 0, length, round_up(length, kQueries), dim, upstream + at * dim / 2);
    for (int64_t first = 0; first < length; first += kQueries) {
      columns_of_pairs(q, first, length, kQueries, dim, query_columns + (at + first) * dim / 2);
      columns_of_pairs(dout, first, length, kQueries, dim, upstream_columns + (at + first) * dim / 2);
    }
    for (int64_t i = 0; i < length; ++i) {
      out.fetch(i + kAhead, dim);
      float sum = 0.0f;
      for (int64_t d = 0; d < dim; d += 16) {
        float lanes[16], part = 0.0f;
        for (int j = 0; j < 16; ++j) lanes[j] = widened(dout.token(i)[d + j]) * widened(out.token(i)[d + j]);
        for (float x : lanes) part += x;
        sum += part;
      }
      delta[at + i] = sum;
    }
    std::copy_n(log_sums, length, lse + at);
    std::fill_n(dq + at * dim, round_up(length, kQueries) * dim, 0.0f);
  }

  // Weights and the scores' gradients of queries `row` and `row + 1` of a block, which see so many keys of it.
  template <int Vectors>
  void differentiate(int64_t at, int64_t row, const int64_t (&seen)[2]) {
    for (int v = 0; v < Vectors; ++v) {
      __m256bh w[2], d[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t place = (row + i) * kKeys + 16 * v;
        const __mmask16 mask = columns_before(seen[i], 16 * v);
        const __m512 e = _mm512_maskz_mov_ps(mask, exp_of(_mm512_load_ps(scores + place) * scale - lse[at + row + i]));
        const __m512 centred = _mm512_load_ps(products + place) - delta[at + row + i];
        w[i] = _mm512_cvtneps_pbh(e), d[i] = _mm512_cvtneps_pbh(_mm512_maskz_mul_ps(mask, e, centred));
        _mm256_store_si256(reinterpret_cast<__m256i*>(dscore_rows + place), (__m256i)d[i]);
      }
      const int64_t place = 16 * v / kPanel * kPanel * (kQueries / 2) + row / 2 * kPanel + 16 * v % kPanel;
      _mm512_store_si512(weights + place, pairs_of(w[0], w[1]));
      _mm512_store_si512(dscores + place, pairs_of(d[0], d[1]));
    }
  }

  void run(const Head& k, const Head& v, int64_t length, const Head& to_k, const Head& to_v) {
    constexpr int64_t kPairs = kQueries / 2;
    for (int64_t key = 0; key < length; key += kKeys) {
      const int64_t last = std::min<int64_t>(key + kKeys, length);
      panels_of_tokens(k, key, last, kKeys, dim, keys);
      panels_of_tokens(v, key, last, kKeys, dim, values);
      panels_of_dims(k, key, last, kKeys, dim, key_rows);
      std::fill_n(dk, dim * kKeys, 0.0f), std::fill_n(dv, dim * kKeys, 0.0f);
      for (int64_t member = 0; member < group; ++member)
        for (int64_t first = causal ? key / kQueries * kQueries : 0; first < length; first += kQueries) {
          const int64_t at = member * most + first, count = std::min<int64_t>(kQueries, length - first);
          const int64_t width = width_of(key, causal ? first + count : length);
          const auto seen = [&](int64_t row) { return row < count ? (causal ? first + row + 1 : length) - key : 0; };
          const auto columns = [&](int64_t row) {
            return Part{std::min(width, seen(std::min(row + kRows, count) - 1)), dim / 2};
          };
          const int64_t rows = round_up(count, kRows);
          product(queries + at * dim / 2, dim / 2, keys, kPanel * dim / 2, rows, width, columns, scores, kKeys, false);
          product(upstream + at * dim / 2, dim / 2, values, kPanel * dim / 2, rows, width, columns, products, kKeys, false);
          for (int64_t row = 0; row < kQueries; row += 2) {
            const int64_t both[2] = {seen(row), seen(row + 1)};
            width == kKeys ? differentiate<kKeys / 16>(at, row, both) : differentiate<kPanel / 16>(at, row, both);
          }
          const auto all = [&](int64_t) { return Part{width, round_up(count, 2) / 2}; };
          product(upstream_columns + at * dim / 2, kPairs, weights, kPairs * kPanel, dim, width, all, dv, kKeys, true);
          product(query_columns + at * dim / 2, kPairs, dscores, kPairs * kPanel, dim, width, all, dk, kKeys, true);
          const auto pairs = [&](int64_t row) { return Part{dim, (columns(row).columns + 1) / 2}; };
          product(reinterpret_cast<const Pair*>(dscore_rows), kKeys / 2, key_rows, kKeys / 2 * kPanel, rows, dim, pairs,
                  dq + at * dim, dim, true);
        }
      give_keys(dk, scale, key, last, to_k);
      give_keys(dv, 1.0f, key, last, to_v);
    }
  }

  void give_queries(int64_t member, int64_t length, const Head& to) {
    const float* from = dq + member * most * dim;
    for (int64_t i = 0; i < length; ++i, from += dim) {
      bfloat16* token = to.token(i);
      for (int64_t d = 0; d < dim; ++d) narrowed(from[d] * scale, token[d]);
    }
  }

  // Keys [begin, end) of `from` (dim, 128), multiplied, by way of rows in the place of the keys themselves.
  void give_keys(const float* from, float factor, int64_t begin, int64_t end, const Head& to) {
    for (int64_t d = 0; d < dim / 2; ++d, from += 2 * kKeys)
      for (int j = 0; j < kKeys; ++j) keys[j * (dim / 2) + d] = pair_of(from[j] * factor, from[kKeys + j] * factor);
    for (int64_t j = begin; j < end; ++j)
      std::memcpy(to.token(j), keys + (j - begin) * dim / 2, dim * sizeof(bfloat16));
  }
};

// Tokens and heads of (tokens, heads, dim), as far apart as said, in elements.
struct Packed {
  bfloat16* data;
  int64_t token, head;
  Head of(int64_t start, int64_t number) const { return {data + start * token + number * head, token}; }
};

struct Sizes {
  const int64_t* starts;  // of documents, and where the last one ends
  int64_t documents, tokens, heads, key_heads, dim;
  int32_t causal;
  float scale;

  int64_t longest() const {
    int64_t result = 0;
    for (int64_t i = 0; i < documents; ++i) result = std::max(result, starts[i + 1] - starts[i]);
    return result;
  }

  // Those of which each has a document's keys to work on.
  int threads(int most) const { return static_cast<int>(std::min<int64_t>(most, documents * key_heads)); }
};

}  // namespace

extern "C" int tilewright_attention_serves() { return __builtin_cpu_supports("avx512bf16"); }

// out (tokens, heads, dim) and, in float32, the logarithm of each query's sum of exponentials: lse (heads, tokens).
extern "C" void tilewright_attention_forward(const Sizes* sizes, const Packed* q, const Packed* k, const Packed* v,
                                             const Packed* out, float* lse, int threads) {
  const Sizes& s = *sizes;
  const int64_t group = s.heads / s.key_heads;
#pragma omp parallel num_threads(s.threads(threads))
  {
    Forward forward{.longest = s.longest(), .dim = s.dim, .causal = s.causal != 0, .scale = s.scale};
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < s.documents * s.key_heads; ++i) {
      const int64_t start = s.starts[i / s.key_heads], length = s.starts[i / s.key_heads + 1] - start;
      const int64_t key_head = i % s.key_heads;
      forward.take_keys(k->of(start, key_head), v->of(start, key_head), length);
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head)
        forward.run(q->of(start, head), length, out->of(start, head), lse + head * s.tokens + start);
    }
  }
}

extern "C" void tilewright_attention_backward(const Sizes* sizes, const Packed* dout, const Packed* q, const Packed* k,
                                              const Packed* v, const Packed* out, const float* lse, const Packed* dq,
                                              const Packed* dk, const Packed* dv, int threads) {
  const Sizes& s = *sizes;
  const int64_t group = s.heads / s.key_heads;
#pragma omp parallel num_threads(s.threads(threads))
  {
    Backward backward{.longest = s.longest(), .dim = s.dim, .causal = s.causal != 0, .scale = s.scale, .group = group};
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < s.documents * s.key_heads; ++i) {
      const int64_t start = s.starts[i / s.key_heads], length = s.starts[i / s.key_heads + 1] - start;
      const int64_t key_head = i % s.key_heads;
      for (int64_t member = 0; member < group; ++member) {
        const int64_t head = key_head * group + member;
        backward.take_queries(member, q->of(start, head), dout->of(start, head), out->of(start, head),
                              lse + head * s.tokens + start, length);
      }
      backward.run(k->of(start, key_head), v->of(start, key_head), length, dk->of(start, key_head),
                   dv->of(start, key_head));
      for (int64_t member = 0; member < group; ++member)
        backward.give_queries(member, length, dq->of(start, key_head * group + member));
    }
  }
}
