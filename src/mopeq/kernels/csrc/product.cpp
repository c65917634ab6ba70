#include "product.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "threads.hpp"

#if defined(MOPEQ_X86)
#include <cpuid.h>
#elif defined(MOPEQ_ARM) && !defined(__APPLE__)
#include <sys/auxv.h>
#endif

namespace mopeq {
namespace {

constexpr int64_t PIECE = 64 << 10;  // bytes of codes that a thread takes at a time
constexpr int64_t ALONE = 96 << 10;  // less work, in bytes of codes, is not worth waking threads
constexpr int64_t LONG = 8 << 20;    // most of it in one run: bytes of codes times tokens
constexpr int64_t FEW = 1 << 14;     // activations that are not either
constexpr int TILES[] = {1, 2, 4};
constexpr int64_t MANY = 48;         // tokens from which on it is faster to unpack a panel once
constexpr int64_t CHUNK = 512;       // its inputs that are unpacked at a time: two panels and four tokens fit in a cache

std::atomic<int> chosen{-1};

int64_t kind_of(const mopeq_matrix &m) { return m.kind & ~int64_t(MOPEQ_ROTATED); }

bool rotates(const mopeq_matrix &m) { return m.bits != 16 && m.kind & MOPEQ_ROTATED; }

int width_index(const mopeq_matrix &m) {
  if (kind_of(m) == MOPEQ_CODEBOOK) return m.bits == 2 ? 6 : -1;
  switch (m.bits) {
    case 2: case 3: case 4: case 5: case 6: return int(m.bits) - 2;
    case 8: return 5;
    default: return -1;
  }
}

int check(const mopeq_matrix &m, const mopeq_group &in, int64_t inputs) {
  if (m.rows < 8 || m.rows % 8 || m.rows >= LIMIT || m.inputs != inputs) return MOPEQ_SHAPE;
  const auto inside = [](int64_t begin, int64_t count, int64_t size) {
    return begin >= 0 && count >= 0 && begin <= size && count <= size - begin;
  };
  if (m.bits == 16)
    return inside(m.codes, 2 * m.rows * m.inputs, in.codes_size) && m.codes % 2 == 0 ? MOPEQ_OK : MOPEQ_RANGE;
  if (kind_of(m) < MOPEQ_ZEROS || kind_of(m) > MOPEQ_CODEBOOK || width_index(m) < 0) return MOPEQ_BITS;
  if (m.group < BLOCK || m.group % BLOCK || m.inputs % m.group) return MOPEQ_GROUP;
  const int64_t groups = m.inputs / m.group;
  if (!inside(m.codes, m.rows * (m.inputs * m.bits / 8), in.codes_size)) return MOPEQ_RANGE;
  if (!in.scales || !inside(m.scales, m.rows * groups, in.scales_size)) return MOPEQ_RANGE;
  if (kind_of(m) == MOPEQ_ZEROS && (!in.zeros || !inside(m.zeros, groups * (m.rows * m.bits / 8), in.zeros_size)))
    return MOPEQ_RANGE;
  return MOPEQ_OK;
}

int64_t panels_of(const mopeq_matrix &m) { return (m.rows + PANEL - 1) / PANEL; }

// Panel number `p` of a matrix; where it ends, the next begins.
Panel panel_of(const Product &product, const mopeq_matrix &m, int64_t p) {
  const mopeq_group &group = *product.group;
  const int64_t row = p * PANEL, groups = m.inputs / m.group;
  Panel panel{};
  panel.codes = group.codes + m.codes + row * (m.inputs * m.bits / 8);
  panel.scales = group.scales + m.scales + row * groups;
  panel.zeros = kind_of(m) != MOPEQ_ZEROS ? nullptr : group.zeros + m.zeros + row / 8 * m.bits * groups;
  panel.groups = groups, panel.blocks = m.group / BLOCK;
  const int64_t height = std::min<int64_t>(PANEL, m.rows - row);
  panel.next_codes = panel.codes + height * (m.inputs * m.bits / 8);
  panel.next_scales = panel.scales + height * groups;
  panel.next_zeros = kind_of(m) != MOPEQ_ZEROS ? nullptr : panel.zeros + height / 8 * m.bits * groups;
  return panel;
}

// A piece of work: panels `first` to `last` of a part.
struct Piece {
  const Product *product;  // null: there is none
  const Part *part;
  int64_t first, last;
};

Piece piece_of(const Product *product, const Product *end, int64_t number) {
  while (product < end && number >= product->pieces) number -= product++->pieces;
  if (product == end) return {nullptr, nullptr, 0, 0};
  const auto after = std::upper_bound(product->parts.begin(), product->parts.end(), number,
                                      [](int64_t value, const Part &part) { return value < part.first; });
  const Part &part = *(after - 1);
  const int64_t first = (number - part.first) * part.panels;
  return {product, &part, first, std::min(first + part.panels, panels_of(*part.matrix))};
}

int tile_of(int64_t tokens) { return tokens >= TILES[2] ? 2 : tokens >= TILES[1] ? 1 : 0; }

// A chunk of two panels with a byte a code.
struct Room {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t size = 0;
  Unpacked panels[2]{};

  // For so many groups of a panel, of so many inputs each. False where there is no memory: a thread must not throw.
  bool make(int64_t groups, int64_t inputs) {
    const int64_t codes = groups * inputs * PANEL, each = groups * PANEL * 4, wanted = 64 + 2 * (codes + each);
    if (wanted > size) {
      size = 0;
      memory.reset(static_cast<char *>(std::malloc(size_t(wanted))));
      if (!memory) return false;
      size = wanted;
    }
    char *at = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    for (Unpacked &panel : panels) {
      panel.codes = reinterpret_cast<uint8_t *>(at);
      panel.scales = reinterpret_cast<float *>(at += codes);
      at += each;
    }
    return true;
  }
};

// Groups that are unpacked at a time.
int64_t chunk_of(const mopeq_matrix &m) { return std::max<int64_t>(1, CHUNK / m.group); }

// Panels `first` to `first + count`, 1 or 2 of 16 rows, of a part that has many tokens.
void many(const Product &product, const Part &part, const Inputs &inputs, int64_t first, int64_t count, Room &room) {
  const mopeq_matrix &m = *part.matrix;
  const Activations x = inputs.view();
  const auto &tiles = product.kernels->tile[m.bits <= inputs.digits.coarse];
  const int64_t groups = m.inputs / m.group, step = chunk_of(m);
  for (int64_t g = 0; g < groups; g += step) {
    const int64_t some = std::min(step, groups - g);
    for (int64_t p = 0; p < count; p++)
      product.kernels->unpack[width_index(m)](panel_of(product, m, first + p), g, some, room.panels[p]);
    for (int64_t t = part.begin; t < part.end;) {
      const int tile = tile_of(part.end - t);
      float *out = product.out + t * product.out_features + part.column + first * PANEL;
      tiles[tile][count - 1](room.panels, g, some, m.group / BLOCK, x, product.rows + t, out, product.out_features);
      t += TILES[tile];
    }
  }
}

// `then` is what this thread does next, if anything.
void work(const Piece &piece, const Piece &then, Room &room) {
  const Product &product = *piece.product;
  const Part &part = *piece.part;
  const mopeq_matrix &m = *part.matrix;
  const Inputs &inputs = rotates(m) ? *product.rotated : *product.x;
  const Activations x = inputs.view();
  const bool unpacks = m.bits != 16 && inputs.digits.count == 2 && part.end - part.begin >= MANY &&
                       product.kernels->unpack[width_index(m)] && room.make(chunk_of(m), m.group);
  const int64_t whole = m.rows / PANEL;  // panels of 16 rows
  for (int64_t p = piece.first; p < piece.last; p++) {
    if (unpacks && p < whole) {
      const int64_t count = std::min<int64_t>(2, std::min(piece.last, whole) - p);
      many(product, part, inputs, p, count, room);
      p += count - 1;
      continue;
    }
    const int64_t row = p * PANEL, height = std::min<int64_t>(PANEL, m.rows - row);
    const int tall = height == PANEL;
    Panel panel{};
    const uint16_t *dense = nullptr;
    if (m.bits == 16) {
      dense = reinterpret_cast<const uint16_t *>(product.group->codes + m.codes) + row * m.inputs;
    } else {
      panel = panel_of(product, m, p);
      if (p + 1 == piece.last && then.product && then.part->matrix->bits != 16) {
        const Panel next = panel_of(*then.product, *then.part->matrix, then.first);
        panel.next_codes = next.codes, panel.next_scales = next.scales, panel.next_zeros = next.zeros;
      }
    }
    const int digits = m.bits <= inputs.digits.coarse ? COARSE : int(inputs.digits.count) - 1;
    for (int64_t t = part.begin; t < part.end;) {
      const int tile = tile_of(part.end - t);
      float *out = product.out + t * product.out_features + part.column + row;
      if (dense)
        product.kernels->dense[tile](dense, height, m.inputs, inputs.wide, product.rows + t, out,
                                     product.out_features);
      else
        product.kernels->panel[width_index(m)][digits][tile][tall](panel, x, product.rows + t, out,
                                                                   product.out_features);
      t += TILES[tile];
    }
  }
}

struct Handing {
  const Product *products;
  int64_t count, all, threads, most;
  std::atomic<int64_t> next{0};

  // The pieces from `first` on that a thread does one after the other: half of an even share of what is left, for memory
  // is read faster in long runs, and at the end one, so that no thread waits long. At most `most`: pieces of many tokens
  // are work, and a run of them that began last would keep the other threads waiting.
  int64_t take(int64_t &first) {
    int64_t some = 1;
    first = next.load(std::memory_order_relaxed);
    do some = std::max<int64_t>(1, std::min(most, (all - first) / (2 * threads)));
    while (!next.compare_exchange_weak(first, first + some, std::memory_order_relaxed));
    return first + some;
  }
};

void pieces(int64_t, int64_t, void *context) {
  Handing &handing = *static_cast<Handing *>(context);
  int64_t next = 0, end = 0;
  const auto take = [&] {
    if (next == end) end = handing.take(next);
    return piece_of(handing.products, handing.products + handing.count, next++);
  };
  Room room;
  for (Piece now = take(); now.product;) {
    const Piece then = take();
    work(now, then, room);
    now = then;
  }
}

struct Filling {
  const Inputs *to;
  Source source;
  const void *context;
  const float *signs;  // with the factor of H; null: as they are
  int64_t run;
};

void filling(int64_t begin, int64_t end, void *context) {
  const Filling &f = *static_cast<Filling *>(context);
  const Inputs &to = *f.to;
  const int64_t k = to.inputs, blocks = k / BLOCK, d = to.digits.count;
  for (int64_t r = begin; r < end; r++) {
    f.source(r, to.wide + r * k, f.context);
    if (f.signs) loops().rotated(to.wide + r * k, f.signs, k, f.run);
    loops().split(to.wide + r * k, blocks, int(d), to.split + r * k * d, to.scales + r * blocks, to.minus + r * blocks * d);
  }
}

#if defined(MOPEQ_X86)
bool has_f16c() {  // by this name __builtin_cpu_supports of clang 14 does not know it
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

}  // namespace

const Kernels *table_of(int isa) {
#if defined(MOPEQ_X86)
  __builtin_cpu_init();
  if (isa == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return &avx512_kernels();
  if (isa == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
    return &avx2_kernels();
#elif defined(MOPEQ_ARM) && defined(__APPLE__)  // all of its processors have them
  if (isa == 1) return &neon_kernels();
#elif defined(MOPEQ_ARM)
  if (isa == 1 && getauxval(AT_HWCAP) & HWCAP_ASIMDDP) return &neon_kernels();
#endif
  return isa == 0 ? &portable_kernels() : nullptr;
}

int best_isa() {
  for (int isa = 2; isa > 0; isa--)
    if (table_of(isa)) return isa;
  return 0;
}

int isa() {
  int found = chosen.load(std::memory_order_relaxed);
  if (found < 0) chosen.store(found = best_isa());
  return found;
}

void use_isa(int isa) { chosen.store(isa); }

int check(const mopeq_group &group, int64_t inputs) {
  if (!group.codes || !group.matrices) return MOPEQ_NULL;
  if (inputs < BLOCK || inputs % BLOCK || inputs >= LIMIT || group.experts < 1 || group.experts >= LIMIT ||
      group.per_expert < 1 || group.per_expert > 16 || group.codes_size < 0 || group.scales_size < 0 ||
      group.zeros_size < 0)
    return MOPEQ_SHAPE;
  return misaligned(group.scales, 2) || misaligned(group.matrices, 8) ? MOPEQ_ALIGN : MOPEQ_OK;
}

Inputs::Inputs(int64_t rows, int64_t inputs, Digits digits, bool rotated)
    : rows(rows), inputs(inputs), digits(digits), rotated(rotated) {
  const int64_t count = digits.count, numbers = rows * inputs, blocks = numbers / BLOCK;
  memory.reset(new Memory(numbers * (4 + count) + blocks * 4 * (1 + count)));
  char *at = memory->data();
  wide = reinterpret_cast<float *>(at);
  split = reinterpret_cast<int8_t *>(at += numbers * 4);
  scales = reinterpret_cast<float *>(at += numbers * count);
  minus = reinterpret_cast<int32_t *>(at += blocks * 4);
}

void fill(const Inputs &to, int64_t threads, Source source, const void *context) {
  std::vector<float> signs;
  const int64_t length = to.inputs & -to.inputs;
  if (to.rotated) {
    signs.resize(size_t(length));
    const float factor = 1.0f / std::sqrt(float(length));
    bool minus = false;  // the Rudin-Shapiro sequence: a sign more for every two neighbouring ones among the bits of i
    for (int64_t i = 0; i < length; i++, minus = false) {
      for (int64_t pairs = i & (i >> 1); pairs; pairs &= pairs - 1) minus = !minus;
      signs[size_t(i)] = minus ? -factor : factor;
    }
  }
  Filling what{&to, source, context, to.rotated ? signs.data() : nullptr, length};
  run(to.rows, to.rows * to.inputs < FEW ? 1 : threads, filling, &what);
}

int Product::plan(const int64_t *offsets, int64_t inputs, int64_t outputs) {
  out_features = outputs;
  for (int64_t e = 0; e < group->experts; e++) {
    int64_t column = 0;
    if (offsets[e] == offsets[e + 1]) continue;
    for (int64_t i = 0; i < group->per_expert; i++) {
      const mopeq_matrix &m = group->matrices[e * group->per_expert + i];
      if (const int wrong = check(m, *group, inputs)) return wrong;
      (rotates(m) ? wants_rotated : wants_plain) = true;
      const int64_t panel_bytes = PANEL * m.inputs * m.bits / 8, each = std::max<int64_t>(2, PIECE / panel_bytes / 2 * 2);
      parts.push_back({&m, offsets[e], offsets[e + 1], column, pieces, each});
      pieces += (panels_of(m) + each - 1) / each;
      bytes += panels_of(m) * panel_bytes * (offsets[e + 1] - offsets[e]);
      column += m.rows;
    }
    if (column != outputs) return MOPEQ_SHAPE;
  }
  return MOPEQ_OK;
}

Filled::Filled(Product &product, int64_t rows, int64_t inputs, Digits digits, int64_t threads, Source source,
               const void *context) {
  for (const bool turned : {false, true}) {
    if (!(turned ? product.wants_rotated : product.wants_plain)) continue;
    std::unique_ptr<Inputs> &made = turned ? rotated : plain;
    made.reset(new Inputs(rows, inputs, digits, turned));
    fill(*made, threads, source, context);
    (turned ? product.rotated : product.x) = made.get();
  }
}

void run(const Product *products, int64_t count, int64_t threads) {
  int64_t all = 0, bytes = 0;
  for (int64_t i = 0; i < count; i++) all += products[i].pieces, bytes += products[i].bytes;
  threads = std::max<int64_t>(1, bytes < ALONE ? 1 : std::min(threads, all));
  Handing handing{products, count, all, threads, std::max<int64_t>(1, LONG * all / std::max<int64_t>(1, bytes))};
  run(threads, threads, pieces, &handing);
}

}  // namespace mopeq
