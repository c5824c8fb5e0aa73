// Cross-entropy of rows of logits and its gradient, for what `cross_entropy.py` defines without a softcap: each row is
// read from memory once and its gradient written once, over it where that is asked for, with one exponential a logit.
// In between it stays in the core's cache, its exponentials as float32.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>

#include "vectors.h"

namespace {

using tilewright::bfloat16, tilewright::exponentials_of, tilewright::kLanes, tilewright::largest_of;
using tilewright::narrowed, tilewright::sum_of, tilewright::widened;

struct Options {
  int64_t ignore_index;
  float label_smoothing, z_loss;
};

// The row's maximum, Σ exp(z − maximum), z of the target (0 if that is no class) and, with label smoothing, Σ z.
template <typename T>
void statistics_of(const T* z, int64_t classes, int64_t target, bool with_sum, float* exponentials, float* statistics) {
  const float top = largest_of(z, classes);
  const float total = exponentials_of(z, classes, top, exponentials);  // NaN of a NaN, which the maximum passes over
  float sum_z = 0.0f;
  if (with_sum) {
    float lanes[kLanes] = {};
    const int64_t whole = classes / kLanes * kLanes;
    for (int64_t start = 0; start < whole; start += kLanes)
      for (int i = 0; i < kLanes; ++i) lanes[i] += widened(z[start + i]);
    for (int64_t j = whole; j < classes; ++j) lanes[0] += widened(z[j]);
    sum_z = sum_of(lanes);
  }
  const bool here = target >= 0 && target < classes;
  const float result[4] = {top, total, here ? widened(z[target]) : 0.0f, sum_z};
  std::copy_n(result, 4, statistics);
}

// upstream · (p (1 + slope) − ε / V − (1 − ε) [j = t]) with the slope of the z-loss, 2 · z_loss · lse.
template <typename T>
void gradient_of(const float* exponentials, int64_t classes, int64_t target, float upstream, const Options& options,
                 const float* statistics, T* gradient) {
  // Without a z-loss not 0 · lse, which may be infinite.
  const float slope = options.z_loss > 0.0f ? 2.0f * options.z_loss * (statistics[0] + std::log(statistics[1])) : 0.0f;
  const float inverse = 1.0f / statistics[1], even = options.label_smoothing / static_cast<float>(classes);
  const float factor = upstream * inverse * (1.0f + slope), less = upstream * even;
  for (int64_t j = 0; j < classes; ++j) narrowed(exponentials[j] * factor - less, gradient[j]);
  if (target >= 0 && target < classes) {
    // p − 1 first, which nearly cancels where the model is sure; then what the z-loss adds.
    const float p = exponentials[target] * inverse;
    narrowed(upstream * (((p - (1.0f - options.label_smoothing)) + p * slope) - even), gradient[target]);
  }
}

template <typename T>
void rows(const T* logits, int64_t stride, const int64_t* targets, const float* upstream, int64_t upstream_stride,
          int64_t count, int64_t classes, const Options& options, float* statistics, T* gradients, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const std::unique_ptr<float[]> exponentials(new float[classes]);
#pragma omp for schedule(dynamic, 4)
    for (int64_t row = 0; row < count; ++row) {
      float* of_row = statistics + 4 * row;
      T* gradient = gradients + classes * row;
      if (targets[row] == options.ignore_index) {
        of_row[0] = of_row[2] = of_row[3] = 0.0f, of_row[1] = 1.0f;
        if (upstream) std::fill_n(gradient, classes, T{0});
        continue;
      }
      const bool with_sum = options.label_smoothing > 0.0f;
      statistics_of(logits + stride * row, classes, targets[row], with_sum, exponentials.get(), of_row);
      if (upstream)
        gradient_of(exponentials.get(), classes, targets[row], upstream[upstream_stride * row], options, of_row, gradient);
    }
  }
}

}  // namespace

// Rows of `logits`, `stride` elements apart, float32 or (`narrow`) bfloat16; `upstream` null for no gradient. Written
// are `statistics` (rows, 4) and `gradients` (rows, classes), whose rows may be those of the logits.
extern "C" void tilewright_cross_entropy(const void* logits, int64_t stride, int narrow, const int64_t* targets,
                                         const float* upstream, int64_t upstream_stride, int64_t count, int64_t classes,
                                         int64_t ignore_index, float label_smoothing, float z_loss, float* statistics,
                                         void* gradients, int threads) {
  const Options options{ignore_index, label_smoothing, z_loss};
  if (narrow)
    rows(static_cast<const bfloat16*>(logits), stride, targets, upstream, upstream_stride, count, classes, options,
         statistics, static_cast<bfloat16*>(gradients), threads);
  else
    rows(static_cast<const float*>(logits), stride, targets, upstream, upstream_stride, count, classes, options,
         statistics, static_cast<float*>(gradients), threads);
}
