// A layer's experts in one call: gate and up, the gate function, down, weighting, combination.
#include "experts.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "product.hpp"
#include "threads.hpp"

namespace mopeq {
namespace {

constexpr int64_t FLOATS = int64_t(1) << 24;  // of experts' outputs held at a time; tokens beyond wait
constexpr int64_t MIDDLE = int64_t(1) << 20;  // of gate's and up's, of a few experts that go through down before the next
constexpr int64_t FEW = 1 << 14;              // numbers that are not worth waking threads

int check_job(const mopeq_experts_job &job, int64_t inner) {
  if (!job.x || !job.out || !job.index || !job.weights) return MOPEQ_NULL;
  if (job.x_type < MOPEQ_F32 || job.x_type > MOPEQ_F16 || !Digits{job.digits, job.coarse}.exist()) return MOPEQ_TYPE;
  const bool biased = job.gate_up_bias || job.down_bias;
  if (biased && (job.bias_type < MOPEQ_F32 || job.bias_type > MOPEQ_F16)) return MOPEQ_TYPE;
  if (job.tokens < 0 || job.tokens >= LIMIT || job.k < 1 || job.k >= LIMIT || job.hidden >= LIMIT ||
      job.gate_up.experts != job.down.experts)
    return MOPEQ_SHAPE;
  if (const int wrong = check(job.gate_up, job.hidden)) return wrong;
  if (const int wrong = check(job.down, inner)) return wrong;
  const auto size = uintptr_t(size_of(job.x_type)), of_bias = uintptr_t(biased ? size_of(job.bias_type) : 1);
  if (misaligned(job.x, size) || misaligned(job.out, size) || misaligned(job.index, 8) || misaligned(job.weights, 4) ||
      misaligned(job.gate_up_bias, of_bias) || misaligned(job.down_bias, of_bias))
    return MOPEQ_ALIGN;
  return MOPEQ_OK;
}

// One batch of tokens; a row is one token in one slot, and rows are sorted by expert.
struct Batch {
  const mopeq_experts_job *job;
  int64_t first, tokens, inner;
  std::vector<int64_t> offsets, place, token, expert;  // (experts + 1); row of each (token, slot), or -1; of each row
  int64_t begin = 0;                                   // the first row of `middle`
  const float *middle = nullptr;                       // (rows of a few experts, 2 * inner)
  const float *rows = nullptr;                         // (rows, hidden)

  Batch(const mopeq_experts_job &of, int64_t first, int64_t tokens, int64_t inner)
      : job(&of), first(first), tokens(tokens), inner(inner), offsets(size_t(of.down.experts + 1)),
        place(size_t(tokens * of.k)) {
    const int64_t experts = of.down.experts, *index = of.index + first * of.k, pairs = tokens * of.k;
    const auto known = [&](int64_t e) { return e >= 0 && e < experts; };
    for (int64_t i = 0; i < pairs; i++)
      if (known(index[i])) offsets[size_t(index[i] + 1)]++;
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
    token.resize(size_t(offsets.back())), expert.resize(size_t(offsets.back()));
    for (int64_t i = 0; i < pairs; i++) {
      const int64_t row = place[size_t(i)] = known(index[i]) ? next[size_t(index[i])]++ : -1;
      if (row >= 0) token[size_t(row)] = i / of.k, expert[size_t(row)] = index[i];
    }
  }
};

void token_row(int64_t row, float *to, const void *context) {
  const Batch &b = *static_cast<const Batch *>(context);
  const int64_t width = b.job->hidden, size = size_of(b.job->x_type);
  loops().widen(static_cast<const char *>(b.job->x) + (b.first + row) * width * size, b.job->x_type, width, to);
}

// Row `expert` of a bias, in float32.
void bias_row(const void *bias, int64_t type, int64_t expert, int64_t width, float *to) {
  loops().widen(static_cast<const char *>(bias) + expert * width * size_of(type), type, width, to);
}

void gated_row(int64_t row, float *to, const void *context) {
  const Batch &b = *static_cast<const Batch *>(context);
  const mopeq_experts_job &job = *b.job;
  const int64_t n = b.inner;
  const float *gate = b.middle + row * 2 * n;
  if (!job.gate_up_bias) return loops().gated(gate, gate + n, n, job.alpha, job.limit, job.shift, to);
  std::vector<float> sum(size_t(2 * n)), bias(size_t(2 * n));
  bias_row(job.gate_up_bias, job.bias_type, b.expert[size_t(b.begin + row)], 2 * n, bias.data());
  const int64_t step = job.interleaved ? 2 : 1, up = job.interleaved ? 1 : n;
  for (int64_t i = 0; i < n; i++) {
    sum[size_t(i)] = gate[i] + bias[size_t(i * step)];
    sum[size_t(n + i)] = gate[n + i] + bias[size_t(i * step + up)];
  }
  loops().gated(sum.data(), sum.data() + n, n, job.alpha, job.limit, job.shift, to);
}

void combine(int64_t begin, int64_t end, void *context) {
  const Batch &b = *static_cast<Batch *>(context);
  const mopeq_experts_job &job = *b.job;
  const int64_t width = job.hidden, size = size_of(job.x_type);
  std::vector<float> total(size_t(width), 0.0f), bias(size_t(job.down_bias ? width : 0));
  for (int64_t t = begin; t < end; t++) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t slot = 0; slot < job.k; slot++) {
      const int64_t row = b.place[size_t(t * job.k + slot)];
      if (row < 0) continue;
      const float weight = job.weights[(b.first + t) * job.k + slot], *from = b.rows + row * width;
      if (job.down_bias) {
        bias_row(job.down_bias, job.bias_type, b.expert[size_t(row)], width, bias.data());
        for (int64_t i = 0; i < width; i++) total[size_t(i)] += weight * (from[i] + bias[size_t(i)]);
      } else {
        for (int64_t i = 0; i < width; i++) total[size_t(i)] += weight * from[i];
      }
    }
    loops().narrow(total.data(), job.x_type, width, static_cast<char *>(job.out) + (b.first + t) * width * size);
  }
}

// Rows `begin` to `end` through their experts. middle: (end - begin, 2 * inner), what lies between; out: (rows, hidden).
int some_experts(Batch &b, const Product &filled, int64_t begin, int64_t end, float *middle, float *out) {
  const mopeq_experts_job &job = *b.job;
  std::vector<int64_t> offsets(b.offsets), order(size_t(end - begin), 0);
  for (int64_t &offset : offsets) offset = std::clamp(offset, begin, end) - begin;
  std::iota(order.begin(), order.end(), 0);
  Product gate_up(job.gate_up), down(job.down);
  if (const int wrong = gate_up.plan(offsets.data(), job.hidden, 2 * b.inner)) return wrong;
  if (const int wrong = down.plan(offsets.data(), b.inner, job.hidden)) return wrong;
  gate_up.x = filled.x, gate_up.rotated = filled.rotated;
  gate_up.rows = b.token.data() + begin, gate_up.out = middle;
  run(&gate_up, 1, job.threads);
  b.begin = begin, b.middle = middle;
  const Filled h(down, end - begin, b.inner, {job.digits, job.coarse}, job.threads, gated_row, &b);
  down.rows = order.data(), down.out = out + begin * job.hidden;
  run(&down, 1, job.threads);
  return MOPEQ_OK;
}

int batch(const mopeq_experts_job &job, int64_t first, int64_t tokens, int64_t inner) {
  Batch b(job, first, tokens, inner);
  const int64_t rows = b.offsets.back(), most = std::max<int64_t>(1, MIDDLE / (2 * inner));
  Product all(job.gate_up);
  if (const int wrong = all.plan(b.offsets.data(), job.hidden, 2 * inner)) return wrong;
  const Memory out(rows * job.hidden, 4);
  {
    const Filled x(all, tokens, job.hidden, {job.digits, job.coarse}, job.threads, token_row, &b);
    int64_t room = most;
    for (size_t e = 1; e < b.offsets.size(); e++) room = std::max(room, b.offsets[e] - b.offsets[e - 1]);
    const Memory middle(std::min(rows, room) * 2 * inner, 4);
    for (size_t e = 0, next = 0; next + 1 < b.offsets.size(); e = next) {
      const int64_t begin = b.offsets[e];
      for (next = e + 1; next + 1 < b.offsets.size() && b.offsets[next + 1] - begin <= most;) next++;
      const int64_t end = b.offsets[next];
      if (begin == end) continue;
      if (const int wrong = some_experts(b, all, begin, end, middle.floats(), out.floats())) return wrong;
    }
  }
  b.rows = out.floats();
  run(tokens, tokens * job.k * job.hidden < FEW ? 1 : job.threads, combine, &b);
  return MOPEQ_OK;
}

}  // namespace

int experts(const mopeq_experts_job &job) {
  if (!job.down.matrices) return MOPEQ_NULL;
  if (misaligned(job.down.matrices, 8)) return MOPEQ_ALIGN;
  if (job.down.experts < 1 || job.down.per_expert < 1) return MOPEQ_SHAPE;
  const int64_t inner = job.down.matrices[0].inputs;
  if (const int wrong = check_job(job, inner)) return wrong;
  const int64_t each = std::max<int64_t>(1, FLOATS / (job.k * (2 * inner + job.hidden)));
  for (int64_t first = 0; first < job.tokens; first += each)
    if (const int wrong = batch(job, first, std::min(each, job.tokens - first), inner)) return wrong;
  return MOPEQ_OK;
}

}  // namespace mopeq
