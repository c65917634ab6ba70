// Activations of any type to float32 and to digits. Plain C++ without contraction: the same bits everywhere.
#include "activations.hpp"

#include <cmath>
#include <cstring>

#include "mopeq_cpu.h"

namespace mopeq {
namespace {

float as_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

float half(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  const float v = as_float(rest << 13) * 0x1p112f;  // exact, subnormals too
  return sign ? -v : v;
}

constexpr float ROUND = 0x1.8p23f;      // adding and subtracting it rounds to the nearest integer
constexpr float SMALLEST = 0x1p-100f;   // a block whose largest is smaller counts as zeros

}  // namespace

void widen(const void *x, int64_t type, int64_t count, float *to) {
  if (type == MOPEQ_F32) {
    std::memcpy(to, x, size_t(count) * 4);
    return;
  }
  const auto *from = static_cast<const uint16_t *>(x);
  if (type == MOPEQ_BF16) {
    for (int64_t i = 0; i < count; i++) to[i] = as_float(uint32_t(from[i]) << 16);
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = half(from[i]);
  }
}

void split(const float *x, int64_t blocks, int digits, int8_t *to, float *scales, int32_t *minus) {
  constexpr float LARGEST[] = {127, 127 * 128, 127 * 16384};
  for (int64_t b = 0; b < blocks; b++, x += 32, to += 32 * digits, minus += digits) {
    float top = 0;
    bool finite = true;
    for (int i = 0; i < 32; i++) {
      const float v = std::fabs(x[i]);
      top = v > top ? v : top;
      finite = finite & (v <= 0x1.fffffep127f);
    }
    if (!finite || top < SMALLEST) {
      scales[b] = finite ? 0.0f : as_float(0x7fc00000);
      std::memset(to, 0, size_t(32 * digits));
      std::memset(minus, 0, size_t(digits) * 4);
      continue;
    }
    scales[b] = top / LARGEST[digits - 1];
    const float inverse = LARGEST[digits - 1] / top;
    int32_t q[32], sum[3] = {};
    for (int i = 0; i < 32; i++) {
      const float v = x[i] * inverse + ROUND;
      int32_t bits;
      std::memcpy(&bits, &v, 4);
      q[i] = bits - 0x4b400000;
    }
    for (int d = digits - 1; d >= 0; d--) {
      for (int i = 0; i < 32; i++) {
        // the last digit lies in [-64, 63]; what is left over belongs to the digits before
        const int32_t rest = d ? (q[i] + 64) >> 7 : 0, digit = q[i] - rest * 128;
        to[32 * d + i] = int8_t(digit);
        sum[d] += digit;
        q[i] = rest;
      }
    }
    for (int d = 0; d < digits; d++) minus[d] = -sum[d];
  }
}

}  // namespace mopeq
