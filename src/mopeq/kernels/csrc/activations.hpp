#pragma once
#include <cstdint>

namespace mopeq {

void widen(const void *x, int64_t type, int64_t count, float *to);
// Rounded to nearest, ties to even.
void narrow(const float *x, int64_t type, int64_t count, void *to);
// e^x of each, at most 88 and taken as -88 below that; e^-88 is 6e-39.
void exponentials(float *x, int64_t count);
// The gate function of mopeq_experts_job.
void gated(const float *gate, const float *up, int64_t count, float alpha, float limit, float shift, float *to);
// One row: (blocks, digits, 32) digits, (blocks) scales, (blocks, digits) minus their sums. A block with an infinite
// or undefined value gets the scale NaN.
void split(const float *x, int64_t blocks, int digits, int8_t *to, float *scales, int32_t *minus);

}  // namespace mopeq
