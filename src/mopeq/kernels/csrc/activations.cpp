// Activations of any type to float32 and to digits. Plain C++ without contraction: the same bits everywhere.
#include "activations.hpp"

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
    int32_t bits[32], most = 0;  // bits of |x|, which order as integers do
    std::memcpy(bits, x, sizeof bits);
    for (int i = 0; i < 32; i++) {
      const int32_t v = bits[i] & 0x7fffffff;
      most = v > most ? v : most;
    }
    const float top = as_float(uint32_t(most));
    const bool finite = most < 0x7f800000;
    if (!finite || top < SMALLEST) {
      scales[b] = finite ? 0.0f : as_float(0x7fc00000);
      std::memset(to, 0, size_t(32 * digits));
      std::memset(minus, 0, size_t(digits) * 4);
      continue;
    }
    scales[b] = top / LARGEST[digits - 1];
    const float inverse = LARGEST[digits - 1] / top;
    float rounded[32];
    for (int i = 0; i < 32; i++) rounded[i] = x[i] * inverse + ROUND;
    int32_t q[32];
    std::memcpy(q, rounded, sizeof q);
    for (int i = 0; i < 32; i++) q[i] -= 0x4b400000;
    for (int d = digits - 1; d > 0; d--) {
      int32_t sum = 0;
      for (int i = 0; i < 32; i++) {
        // a last digit lies in [-64, 63]; what is left over belongs to the digits before
        const int32_t rest = (q[i] + 64) >> 7, digit = q[i] - rest * 128;
        to[32 * d + i] = int8_t(digit);
        sum += digit;
        q[i] = rest;
      }
      minus[d] = -sum;
    }
    int32_t sum = 0;
    for (int i = 0; i < 32; i++) to[i] = int8_t(q[i]), sum += q[i];
    minus[0] = -sum;
  }
}

}  // namespace mopeq
