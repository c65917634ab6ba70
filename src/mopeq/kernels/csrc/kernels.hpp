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
  // Where the thread reads on after this panel: only fetched, never read, so it may be anywhere.
  const uint8_t *next_codes;
  const uint16_t *next_scales;
  const uint8_t *next_zeros;
};

// Outputs of a tile of tokens, t being row rows[t] of the activations: out[t * stride + 0 .. height).
using PanelKernel = void (*)(const Panel &, const Activations &, const int64_t *rows, float *out, int64_t stride);
// The same for `height` rows of bfloat16; x (rows, inputs) float32.
using DenseKernel = void (*)(const uint16_t *weight, int64_t height, int64_t inputs, const float *x,
                             const int64_t *rows, float *out, int64_t stride);
using WideKernel = void (*)(const float *weight, int64_t height, int64_t inputs, const float *x, const int64_t *rows,
                            float *out, int64_t stride);

// Digits of the activations, and how many of them are used.
constexpr int DIGITS[][2] = {{1, 1}, {2, 2}, {3, 3}, {2, 1}};
enum : int { COARSE = 3 };  // index of {2, 1}

constexpr int64_t MAX_HEAD = 1024;  // numbers of a head

// One query of one head: its keys and values (count, size), of type `type`.
struct Attending {
  const float *query;  // (size), scaled
  const char *keys, *values;
  int64_t type, count, size;
};

// Loops over rows of numbers (loops.inc).
struct Loops {
  void (*widen)(const void *x, int64_t type, int64_t count, float *to);
  // Rounded to nearest, ties to even.
  void (*narrow)(const float *x, int64_t type, int64_t count, void *to);
  // e^x of each, at most 88 and taken as -88 below that; e^-88 is 6e-39.
  void (*exponentials)(float *x, int64_t count);
  // The gate function of mopeq_experts_job.
  void (*gated)(const float *gate, const float *up, int64_t count, float alpha, float limit, float shift, float *to);
  // One row: (blocks, digits, 32) digits, (blocks) scales, (blocks, digits) minus their sums. A block with an infinite
  // or undefined value gets the scale NaN.
  void (*split)(const float *x, int64_t blocks, int digits, int8_t *to, float *scales, int32_t *minus);
  // weight * x / sqrt(mean(x^2) + eps)
  void (*norm)(const float *x, const float *weight, int64_t count, float eps, float *to);
  // H x of every run of `size` numbers, a power of two from 16 on: signs (size) multiply them first, and have the factor
  // of H in them.
  void (*rotated)(float *x, const float *signs, int64_t count, int64_t size);
  // weights: (count), room to work in.
  void (*attend)(const Attending &a, float *weights, float *out);
};

// Some groups of a panel of 16 rows with a byte a code, for many tokens, from addresses that 64 divides. Codes are moved
// up so that the same `zero` is that of all rows and groups: what it takes off is then one number for a token's block.
struct Unpacked {
  uint8_t *codes;  // (groups * blocks, chunks of 4 inputs, 16 rows, 4)
  float *scales;   // (groups, 16)
  int32_t zero;
};
// Groups `first` to `first + count` of a panel.
using UnpackKernel = void (*)(const Panel &, int64_t first, int64_t count, Unpacked &to);
// What these groups, of one panel or of two side by side, add to the outputs of a tile of tokens; the first set them.
using TileKernel = void (*)(const Unpacked *panels, int64_t first, int64_t count, int64_t blocks, const Activations &,
                            const int64_t *rows, float *out, int64_t stride);

// One group of some rows whose grids are improved: the scale of least squared error among the multiples `factors` of the
// one that is there, with the zero points beside it, refitted to the codes `refits` times.
struct Search {
  const float *w;  // (rows, size), `stride` apart
  int64_t rows, stride, size;
  const float *h;        // (size), weights of the squares, none negative, or null
  const float *factors;  // (factor_count)
  int64_t factor_count, refits;
  int levels;
  bool symmetric;
  float *scale, *zero;  // of row r at r * groups
  int64_t groups;
  float *room;  // (16, size), from an address that 64 divides
};

// Grids and codes (grids.inc).
struct Grids {
  // False where a weight is not finite, or the scale too large for fp16.
  bool (*minmax)(const float *w, int64_t size, int levels, bool symmetric, float *scale, float *zero);
  void (*nearest)(const float *w, int64_t size, float scale, float zero, int levels, uint8_t *codes);
  void (*search)(const Search &job);
};

struct Kernels {
  PanelKernel panel[7][4][3][2];           // width 2 3 4 5 6 8, codebook; DIGITS; tile of 1, 2, 4 tokens; height 8, 16
  DenseKernel dense[3];                    // tile of 1, 2, 4 tokens
  WideKernel wide;                         // one token, rows of float32
  UnpackKernel unpack[7];                  // width; null where `panel` is for many tokens too
  TileKernel tile[2][3][2];                // 2 digits, or the first of them; tile of 1, 2, 4 tokens; 1 or 2 panels
  void (*read)(const void *data, int64_t bytes, uint64_t *sum);
  Loops loops;
  Grids grids;
};

const Kernels &portable_kernels();
#if defined(MOPEQ_X86)
const Kernels &avx2_kernels();
const Kernels &avx512_kernels();
#elif defined(MOPEQ_ARM)
const Kernels &neon_kernels();
#endif

}  // namespace mopeq
