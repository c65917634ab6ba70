// What the instruction sets' translation units share. No intrinsics, no inline functions: each unit is compiled with
// other flags, and the linker may keep any one copy of an inline function.
#pragma once
#include <cstdint>

namespace mopeq {

enum : int { BLOCK = 32, PANEL = 16, MAX_DIGITS = 3 };

// What kernels are made for: a width in bits, or the codebook, 2 bits a weight. A code of 4 bits stands for the inputs
// in one lane of an even chunk and of the odd one after it.
enum : int { CODEBOOK = 1, POINT_ZERO = 16 };
constexpr int bits_of(int width) { return width == CODEBOOK ? 2 : width; }
// The points of the codebook (PAIRS in qtensor.py) plus POINT_ZERO, so that they are unsigned and at most 32.
constexpr uint8_t POINTS[2][16] = {{7, 2, 24, 28, 20, 12, 19, 9, 20, 12, 16, 8, 28, 2, 32, 18},
                                   {2, 12, 16, 26, 22, 23, 31, 16, 10, 9, 16, 31, 6, 22, 16, 1}};

// Activations as digits to the base 128, most significant first: x = scale * sum_d digit[d] * 128^(digits-1-d).
struct Activations {
  const int8_t *digits;   // (rows, blocks, digits, 32)
  const float *scales;    // (rows, blocks)
  const int32_t *minus;   // (rows, blocks, digits): minus the sum of the 32 digits
  int64_t blocks;
};

// One panel: `height` (16 or 8) rows of a matrix.
struct Panel {
  const uint8_t *codes;
  const uint16_t *scales;  // (groups, height)
  const uint8_t *zeros;    // (groups, height * bits / 8), null if symmetric
  int64_t groups, blocks;  // blocks of 32 inputs in a group
};

// Outputs of a tile of tokens, t being row rows[t] of the activations: out[t * stride + 0 .. height).
using PanelKernel = void (*)(const Panel &, const Activations &, const int64_t *rows, float *out, int64_t stride);
// The same for `height` rows of bfloat16; x (rows, inputs) float32.
using DenseKernel = void (*)(const uint16_t *weight, int64_t height, int64_t inputs, const float *x,
                             const int64_t *rows, float *out, int64_t stride);
using WideKernel = void (*)(const float *weight, int64_t height, int64_t inputs, const float *x, const int64_t *rows,
                            float *out, int64_t stride);

struct Kernels {
  PanelKernel panel[7][MAX_DIGITS][3][2];  // width 2 3 4 5 6 8, codebook; digits - 1; tile of 1, 2, 4 tokens; height 8, 16
  DenseKernel dense[3];                    // tile of 1, 2, 4 tokens
  WideKernel wide;                         // one token, rows of float32
  void (*read)(const void *data, int64_t bytes, uint64_t *sum);
};

const Kernels &portable_kernels();
#if defined(MOPEQ_X86)
const Kernels &avx2_kernels();
const Kernels &avx512_kernels();
#endif

}  // namespace mopeq
