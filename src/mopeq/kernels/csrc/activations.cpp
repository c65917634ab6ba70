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

uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

uint16_t to_brain(float v) {
  const uint32_t b = bits_of(v), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

uint16_t to_half(float v) {
  const uint32_t b = bits_of(v), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and more
  if (rest < 0x38800000)  // subnormal: adding 0.5 leaves multiples of 2^-24 in the last bits
    return uint16_t(sign | (bits_of(as_float(rest) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

// e^x for |x| <= 88, within 2 units of the last place. Cody and Waite's reduction, and the polynomial of Cephes' expf.
float exponential(float x) {
  const float shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return x == x ? as_float(bits_of(p) + (bits_of(shifted) << 23)) : x;
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

void narrow(const float *x, int64_t type, int64_t count, void *to) {
  if (type == MOPEQ_F32) {
    std::memcpy(to, x, size_t(count) * 4);
    return;
  }
  auto *out = static_cast<uint16_t *>(to);
  if (type == MOPEQ_BF16) {
    for (int64_t i = 0; i < count; i++) out[i] = to_brain(x[i]);
  } else {
    for (int64_t i = 0; i < count; i++) out[i] = to_half(x[i]);
  }
}

void exponentials(float *x, int64_t count) {
  for (int64_t i = 0; i < count; i++) x[i] = exponential(-88.0f > x[i] ? -88.0f : x[i]);
}

void gated(const float *gate, const float *up, int64_t count, float alpha, float limit, float shift, float *to) {
  for (int64_t i = 0; i < count; i++) {
    const float g = limit < gate[i] ? limit : gate[i];  // undefined numbers stay so
    float u = limit < up[i] ? limit : up[i];
    u = -limit > u ? -limit : u;
    float x = -alpha * g;
    x = 88.0f < x ? 88.0f : x;
    x = -88.0f > x ? -88.0f : x;
    to[i] = (u + shift) * (g / (1.0f + exponential(x)));
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
