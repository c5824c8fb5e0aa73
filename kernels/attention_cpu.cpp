// The softmax of `attention_cpu.py`, over rows of bfloat16 scores that lie in the cache: each is read once and written
// once, with one exponential a score that a query may see.

#include <algorithm>
#include <cstdint>
#include <memory>

#include "vectors.h"

namespace {

using tilewright::bfloat16, tilewright::exponentials_of, tilewright::largest_of, tilewright::narrowed;

void softmax_of(bfloat16* scores, int64_t count, float* exponentials) {
  const float inverse = 1.0f / exponentials_of(scores, count, 0.0f, exponentials);
  for (int64_t j = 0; j < count; ++j) narrowed(exponentials[j] * inverse, scores[j]);
}

// How many of `columns` keys query `row` of `rows` sees: where causal, the last query all.
int64_t seen(int64_t row, int64_t rows, int64_t columns, int causal) { return causal ? columns - rows + row + 1 : columns; }

}  // namespace

// Scores (heads, rows, columns). The largest score of each row, as far as its query sees, goes to `largest`, and its
// negative to `negative`; rows and heads of either are as far apart as said, in elements.
extern "C" void tilewright_attention_largest(const bfloat16* scores, int64_t heads, int64_t rows, int64_t columns,
                                             int causal, bfloat16* largest, int64_t largest_head, int64_t largest_row,
                                             bfloat16* negative, int64_t negative_head, int64_t negative_row,
                                             int threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < heads * rows; ++i) {
    const int64_t head = i / rows, row = i % rows;
    const float top = largest_of(scores + i * columns, seen(row, rows, columns, causal));
    narrowed(top, largest[head * largest_head + row * largest_row]);
    narrowed(-top, negative[head * negative_head + row * negative_row]);
  }
}

// Softmax in place of scores (heads, rows, columns) of which none is above 88: a row's largest has been taken off. Keys
// that a query does not see get 0.
extern "C" void tilewright_attention_softmax(bfloat16* scores, int64_t heads, int64_t rows, int64_t columns, int causal,
                                             int threads) {
#pragma omp parallel num_threads(threads)
  {
    const std::unique_ptr<float[]> exponentials(new float[columns]);
#pragma omp for
    for (int64_t i = 0; i < heads * rows; ++i) {
      const int64_t count = seen(i % rows, rows, columns, causal);
      softmax_of(scores + i * columns, count, exponentials.get());
      std::fill(scores + i * columns + count, scores + (i + 1) * columns, bfloat16{0});
    }
  }
}
