// The kernels of the decoder's small ops, of src/backend/cuda, run on the CPU and compared with plain f64 loops.
#include "emulate.h"

#include <algorithm>

#define __shared__ static  // blocks run one after the other
using std::min;
inline float __expf(float v) { return expf(v); }
inline float rsqrtf(float v) { return 1 / sqrtf(v); }
inline double __shfl_xor_sync(uint32_t, double v, int mask) {
  uint64_t bits;
  memcpy(&bits, &v, 8);
  auto& from = exchange({(uint32_t)bits, (uint32_t)(bits >> 32)})[threadIdx.x % 32 ^ mask];
  bits = (uint64_t)from[1] << 32 | from[0];
  memcpy(&v, &bits, 8);
  return v;
}

#include "../../src/backend/cuda/adamw.cuh"
#include "../../src/backend/cuda/cross_entropy.cuh"
#include "../../src/backend/cuda/few_rows.cuh"
#include "../../src/backend/cuda/dora.cuh"
#include "../../src/backend/cuda/embedding.cuh"
#include "../../src/backend/cuda/rms_norm.cuh"
#include "../../src/backend/cuda/rope.cuh"
#include "../../src/backend/cuda/swiglu.cuh"

using elements::Bf16;
using elements::F16;
typedef std::vector<double> Doubles;

static const int JUNK = 8;  // elements of NaN around every array: a read or write outside shows
static int cases = 0, failures = 0;
static uint64_t state = 1;

static double uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (double)(state >> 11) / (1ull << 52) - 1;
}

template <class T> struct alignas(16) Array {
  std::vector<uint4> memory;
  size_t size;
  Array(size_t size, bool filled = true) : memory((size + 2 * JUNK) * sizeof(T) / 16 + 1), size(size) {
    memset(memory.data(), 0xff, memory.size() * 16);
    if (filled)
      for (size_t i = 0; i < size; i++) data()[i] = elements::narrow<T>(uniform());
  }
  T* data() { return (T*)memory.data() + JUNK; }
  Doubles get() {
    Doubles values;
    for (size_t i = 0; i < size; i++) values.push_back(elements::widen(data()[i]));
    return values;
  }
  bool intact() {
    auto* p = (const unsigned char*)memory.data();
    for (size_t i = 0; i < memory.size() * 16; i++)
      if ((i < JUNK * sizeof(T) || i >= (JUNK + size) * sizeof(T)) && p[i] != 0xff) return false;
    return true;
  }
};

template <class T> double limit() { return sizeof(T) == 4 ? 1e-5 : std::is_same<T, F16>::value ? 1e-3 : 8e-3; }

static void judge(const char* what, const Doubles& got, const Doubles& want, double limit, bool intact) {
  double difference = 0, scale = 0;
  for (size_t i = 0; i < want.size(); i++) {
    double d = fabs(got[i] - want[i]);
    difference = d == d ? fmax(difference, d) : INFINITY;
    scale = fmax(scale, fabs(want[i]));
  }
  cases++;
  if (difference / scale <= limit && intact) return;
  failures++;
  printf("FAILED %s of %zu: relative error %.2e over %.0e%s\n", what, want.size(), difference / scale, limit, intact ? "" : ", wrote outside");
}
template <class T> void compare(const char* what, Array<T>& got, const Doubles& want) { judge(what, got.get(), want, limit<T>(), got.intact()); }

template <bool GELU, class T, int N> void check_swiglu(int count, bool reversed) {
  Array<T> gate(count), up(count), g(count), y(count, false), dgate(count, false), dup(count, false);
  swiglu::Args args = {gate.data(), up.data(), g.data(), y.data(), dgate.data(), dup.data(), count};
  Doubles a = gate.get(), b = up.get(), c = g.get(), want_y, want_dgate, want_dup;
  for (int i = 0; i < count; i++) {
    double s = 1 / (1 + exp(-a[i])), value = a[i] * s, slope = s * (1 + a[i] * (1 - s));
    if (GELU) {
      double root = sqrt(2 / M_PI), t = tanh(root * (a[i] + 0.044715 * a[i] * a[i] * a[i]));
      value = a[i] / 2 * (1 + t), slope = (1 + t) / 2 + a[i] / 2 * (1 - t * t) * root * (1 + 0.134145 * a[i] * a[i]);
    }
    want_y.push_back(value * b[i]), want_dgate.push_back(c[i] * b[i] * slope), want_dup.push_back(c[i] * value);
  }
  launch({2}, 64, 0, reversed, [&](unsigned char*) { swiglu::forward<GELU, T, N>(args); });
  compare("swiglu y", y, want_y);
  args.y = nullptr;
  launch({2}, 64, 0, reversed, [&](unsigned char*) { swiglu::backward<GELU, T, N>(args); });
  compare("swiglu dgate", dgate, want_dgate), compare("swiglu dup", dup, want_dup);
  args.y = g.data(), args.dgate = gate.data(), args.dup = up.data();
  launch({2}, 64, 0, reversed, [&](unsigned char*) { swiglu::backward<GELU, T, N>(args); });
  compare("swiglu y in place", g, want_y), compare("swiglu dgate in place", gate, want_dgate), compare("swiglu dup in place", up, want_dup);
}

template <class T, int N> void check_rope(int tokens, int heads, int half, float sign) {
  Array<T> x(tokens * heads * 2 * half);
  Array<float> cos(9 * half), sin(9 * half);
  Doubles before = x.get(), c = cos.get(), s = sin.get(), want(x.size);
  std::vector<uint32_t> positions;
  for (int t = 0; t < tokens; t++) positions.push_back(t * 7 % 9);
  rope::Args args = {x.data(), cos.data(), sin.data(), positions.data(), tokens * heads * half, heads, half, sign};
  launch({3}, 32, 0, false, [&](unsigned char*) { rope::rotate<T, N>(args); });
  for (int row = 0; row < tokens * heads; row++)
    for (int d = 0; d < half; d++) {
      int at = positions[row / heads] * half + d, first = row * 2 * half + d, second = first + half;
      want[first] = before[first] * c[at] - sign * before[second] * s[at];
      want[second] = before[second] * c[at] + sign * before[first] * s[at];
    }
  compare("rope", x, want);
}

template <class T, class W, int N> void check_rms_norm(int m, int n, int warps, bool with_residual) {
  Array<T> x(m * n), residual(m * n), g(m * n), sum(m * n, false), y(m * n, false), dx(m * n);
  Array<W> w(n);
  Array<float> rstd(m, false), dweight(n), parts(2 * n, false);
  double eps = 1e-5;
  Doubles dx_before = dx.get(), dweight_before = dweight.get(), weight = w.get(), grad = g.get();
  rms_norm::Args args = {x.data(), with_residual ? residual.data() : nullptr, w.data(), sum.data(), y.data(), rstd.data(), n, (float)eps};
  launch({m}, 32 * warps, 0, warps % 2, [&](unsigned char*) { rms_norm::forward<T, W, N>(args); });
  Doubles from = x.get();
  if (with_residual) {
    Doubles r = residual.get();
    for (int i = 0; i < m * n; i++) from[i] = elements::widen(elements::narrow<T>(from[i] + r[i]));
    compare("rms_norm sum", sum, from);
  }
  Doubles want_y(m * n), want_rstd(m), want_dx = dx_before, want_dweight = dweight_before;
  for (int row = 0; row < m; row++) {
    double *v = &from[row * n], squares = 0, dot = 0;
    for (int i = 0; i < n; i++) squares += v[i] * v[i];
    double r = want_rstd[row] = 1 / sqrt(squares / n + eps);
    for (int i = 0; i < n; i++) dot += grad[row * n + i] * weight[i] * v[i] * r / n;
    for (int i = 0; i < n; i++) {
      want_y[row * n + i] = v[i] * r * weight[i];
      want_dx[row * n + i] += r * (grad[row * n + i] * weight[i] - v[i] * r * dot);
      want_dweight[i] += grad[row * n + i] * v[i] * r;
    }
  }
  // x rstd is rounded on its way to the weight.
  judge("rms_norm y", y.get(), want_y, 2 * limit<T>(), y.intact());
  compare("rms_norm rstd", rstd, want_rstd);
  rms_norm::BackwardArgs back = {with_residual ? sum.data() : x.data(), w.data(), g.data(), dx.data(), rstd.data(), parts.data(), m, n, (m + 1) / 2};
  launch({m}, 32 * warps, 0, warps % 2, [&](unsigned char*) { rms_norm::backward<T, W, N>(back); });
  launch({(n + 31) / 32, 2}, 32, 0, false, [&](unsigned char*) { rms_norm::weight_parts<T>(back); });
  rms_norm::SumArgs sums = {parts.data(), dweight.data(), n, 2};
  launch({1}, 32, 0, false, [&](unsigned char*) { rms_norm::weight_sum(sums); });
  compare("rms_norm dx", dx, want_dx);
  judge("rms_norm dweight", dweight.get(), want_dweight, limit<T>(), dweight.intact() && parts.intact());
}

template <class T, int N> void check_dora(int m, int n, bool extras) {
  Array<T> u(m * n), residual(m * n), g(m * n), y(m * n, false), du(m * n, false);
  Array<float> c(n), bias(n), norm(n), dm(n), parts(2 * n, false);
  for (int j = 0; j < n; j++) norm.data()[j] += 2;
  Doubles v = u.get(), r = residual.get(), grad = g.get(), cs = c.get(), bs = bias.get(), norms = norm.get(), want_dm = dm.get();
  Doubles want_y, want_du;
  for (int i = 0; i < m * n; i++) {
    want_y.push_back(cs[i % n] * v[i] + (extras ? bs[i % n] + r[i] : 0));
    want_du.push_back(cs[i % n] * grad[i]);
    want_dm[i % n] += grad[i] * v[i] / norms[i % n];
  }
  int rows = (m + 1) / 2, ranges = (m + rows - 1) / rows, blocks = (n + 32 * N - 1) / (32 * N);
  dora::Args args = {u.data(), extras ? residual.data() : nullptr, c.data(), extras ? bias.data() : nullptr, y.data(), m, n, rows};
  launch({blocks, ranges}, 32, 0, false, [&](unsigned char*) { dora::forward<T, N>(args); });
  compare("dora y", y, want_y);
  dora::BackwardArgs back = {u.data(), g.data(), c.data(), norm.data(), du.data(), parts.data(), m, n, rows};
  launch({blocks, ranges}, 32, 0, false, [&](unsigned char*) { dora::backward<T, N>(back); });
  rms_norm::SumArgs sums = {parts.data(), dm.data(), n, ranges};
  launch({1}, 32, 0, false, [&](unsigned char*) { rms_norm::weight_sum(sums); });
  compare("dora du", du, want_du);
  judge("dora dm", dm.get(), want_dm, limit<float>(), dm.intact() && parts.intact());
  Array<T> alone(m * n, false);
  back.du = alone.data(), back.parts = nullptr;
  launch({blocks, ranges}, 32, 0, false, [&](unsigned char*) { dora::backward<T, N>(back); });
  compare("dora du alone", alone, want_du);
}

template <class T> void check_dora_norms(int n) {
  const int r = 3;
  Array<T> p(r * n);
  Array<float> gram(r * r), b(r * n), squares(n), lengths(n, false);
  for (int j = 0; j < n; j++) squares.data()[j] += 30;
  Doubles ps = p.get(), grams = gram.get(), bs = b.get(), want_norm = squares.get();
  for (int j = 0; j < n; j++) {
    for (int q = 0; q < r; q++) {
      double own = 0;
      for (int at = 0; at < r; at++) own += grams[q * r + at] * bs[at * n + j];
      want_norm[j] += bs[q * n + j] * (2 * 1.5 * ps[q * n + j] + 1.5 * 1.5 * own);
    }
    want_norm[j] = sqrt(want_norm[j]);
  }
  dora::NormArgs norm_args = {p.data(), gram.data(), b.data(), squares.data(), lengths.data(), n, r, 1.5, 1e-30};
  launch({(n + 31) / 32}, 32, 0, false, [&](unsigned char*) { dora::norms<T>(norm_args); });
  compare("dora norms", lengths, want_norm);
}

// Logits of type Z; `in_place`: P takes their place.
template <class Z, class T, int N> void check_cross_entropy(int rows, int vocab, int warps, bool in_place = false) {
  Array<Z> logits(rows * vocab);
  Array<float> losses(rows, false);
  Array<T> p(rows * vocab, false);
  float scale = 0.25;
  std::vector<uint32_t> targets;
  for (int row = 0; row < rows; row++) targets.push_back(row * 31 % vocab);
  for (int i = 0; i < rows * vocab; i++) logits.data()[i] = elements::narrow<Z>(20 * elements::widen(logits.data()[i]));
  Doubles z = logits.get(), want_losses, want_p;
  cross_entropy::Args args = {logits.data(), targets.data(), losses.data(), p.data(), vocab, scale};
  Array<Z> before = logits;
  if (in_place) args.p = logits.data();
  launch({rows}, 32 * warps, 0, warps % 2, [&](unsigned char*) { cross_entropy::rows<Z, T, N>(args); });
  if (in_place) memcpy(p.data(), logits.data(), sizeof(T) * rows * vocab), memcpy(logits.data(), before.data(), sizeof(Z) * rows * vocab);
  for (int row = 0; row < rows; row++) {
    double sum = 0;
    for (int i = 0; i < vocab; i++) sum += exp(z[row * vocab + i]);
    want_losses.push_back(log(sum) - z[row * vocab + targets[row]]);
    for (int i = 0; i < vocab; i++) want_p.push_back(scale * (exp(z[row * vocab + i]) / sum - (i == targets[row])));
  }
  compare("cross_entropy loss", losses, want_losses), compare("cross_entropy P", p, want_p);
  // A NaN beside the target makes the loss NaN; the other rows' stay.
  logits.data()[(targets[0] + 1) % vocab] = elements::narrow<Z>(NAN);
  args.p = nullptr;
  launch({rows}, 32 * warps, 0, false, [&](unsigned char*) { cross_entropy::rows<Z, T, N>(args); });
  bool lost = !std::isnan(losses.data()[0]);
  losses.data()[0] = want_losses[0];
  compare("cross_entropy loss, without P", losses, want_losses);
  judge("cross_entropy of NaN", {lost ? 0. : 1.}, {1}, 0, true);
}

template <class T, int N> void check_embedding(int width) {
  const int V = 6;
  // The tokens by id: 3 has tokens 1, 2 and 5; ids 1 and 4 have none.
  std::vector<uint32_t> ids = {5, 3, 3, 0, 2, 3}, places = {4, 0, 5, 2, 1, 3}, distinct = {0, 2, 3, 5}, starts = {0, 1, 2, 5, 6}, order = {3, 4, 1, 2, 5, 0};
  int count = ids.size();
  Array<T> table(V * width), y(count * width, false), scattered(count * width, false), g(count * width);
  Array<float> dtable(V * width);
  Doubles from = table.get(), grad = g.get(), want_dtable = dtable.get(), want_y(count * width), want_scattered(count * width);
  launch({count}, 32, 0, false, [&](unsigned char*) { embedding::rows<T, N>({table.data(), y.data(), ids.data(), width, 0}); });
  launch({count}, 64, 0, false, [&](unsigned char*) { embedding::rows<T, N>({g.data(), scattered.data(), places.data(), width, 1}); });
  launch({(int)distinct.size()}, 32, 0, false, [&](unsigned char*) { embedding::backward<T>({g.data(), dtable.data(), distinct.data(), starts.data(), order.data(), width}); });
  for (int t = 0; t < count; t++)
    for (int i = 0; i < width; i++) {
      want_y[t * width + i] = from[ids[t] * width + i];
      want_scattered[places[t] * width + i] = grad[t * width + i];
      want_dtable[ids[t] * width + i] += grad[t * width + i];
    }
  judge("embedding y", y.get(), want_y, 0, y.intact());
  judge("embedding scattered", scattered.get(), want_scattered, 0, scattered.intact());
  compare("embedding dtable", dtable, want_dtable);
}

static void check_adamw(int n) {
  Array<float> block(3 * n), grads(n);
  for (int i = 2 * n; i < 3 * n; i++) block.data()[i] = fabs(block.data()[i]);
  Doubles b = block.get(), g = grads.get(), want(3 * n);
  adamw::Args args = {block.data(), grads.data(), n, 0.5, 0.999, 0.99, 0.1, 0.01, 0.03, 0.2, 1e-8};
  launch({2}, 64, 0, false, [&](unsigned char*) { adamw::step(args); });
  for (int i = 0; i < n; i++) {
    double grad = 0.5 * g[i], m = b[n + i] + 0.1 * (grad - b[n + i]), v = 0.99 * b[2 * n + i] + 0.01 * grad * grad;
    want[i] = 0.999 * b[i] - 0.03 * m / (sqrt(v) / 0.2 + 1e-8), want[n + i] = m, want[2 * n + i] = v;
  }
  compare("adamw", block, want);
  Doubles parts(3, NAN), squares(1);
  adamw::SumArgs sum = {grads.data(), parts.data(), n, 1};
  launch({3}, 64, 0, true, [&](unsigned char*) { adamw::sum(sum); });
  for (double value : g) squares[0] += value * value;
  judge("adamw's norm", {parts[0] + parts[1] + parts[2]}, squares, 1e-12, true);
}

// The value of element `i` of a block, from its bits one at a time: the layouts as `backend::quantized` tells them.
static double half_of(const unsigned char* p) { return elements::widen(*(const F16*)p); }
static double float_of(const unsigned char* p) { return *(const float*)p; }
static int bit_of(const unsigned char* p, int bit) { return p[bit / 8] >> bit % 8 & 1; }
static int nibble_of(const unsigned char* codes, int i) { return codes[i % 16] >> (i / 16 * 4) & 15; }
static void k_of(const unsigned char* b, int group, double& d, double& m) {
  // Twelve bytes: the low six bits of scales 0 to 3 and minima 0 to 3, then low halves of both for 4 to 7, whose two high bits are on top
  // of the first eight bytes.
  const unsigned char* s = b + 4;
  int scale = group < 4 ? s[group] % 64 : s[group + 4] % 16 + s[group - 4] / 64 * 16;
  int min = group < 4 ? s[group + 4] % 64 : s[group + 4] / 16 + s[group] / 64 * 16;
  d = half_of(b) * scale, m = half_of(b + 2) * min;
}
static double value_of(dequantize::q8_0, const unsigned char* b, int i) { return half_of(b) * (signed char)b[2 + i]; }
static double value_of(dequantize::q4_0, const unsigned char* b, int i) { return half_of(b) * (nibble_of(b + 2, i) - 8); }
static double value_of(dequantize::q4_1, const unsigned char* b, int i) { return half_of(b) * nibble_of(b + 4, i) + half_of(b + 2); }
static double value_of(dequantize::q5_0, const unsigned char* b, int i) { return half_of(b) * (nibble_of(b + 6, i) + 16 * bit_of(b + 2, i) - 16); }
static double value_of(dequantize::q5_1, const unsigned char* b, int i) { return half_of(b) * (nibble_of(b + 8, i) + 16 * bit_of(b + 4, i)) + half_of(b + 2); }
static double value_of(dequantize::q4_k, const unsigned char* b, int i) {
  double d, m;
  k_of(b, i / 32, d, m);
  return d * (b[16 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15) - m;
}
static double value_of(dequantize::q5_k, const unsigned char* b, int i) {
  double d, m;
  k_of(b, i / 32, d, m);
  return d * ((b[48 + i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15) + 16 * bit_of(b + 16 + i % 32, i / 32)) - m;
}
static double value_of(dequantize::q6_k, const unsigned char* b, int i) {
  int half = i / 128, part = i / 32 % 4, j = i % 32;
  int low = b[64 * half + part % 2 * 32 + j] >> (part / 2 * 4) & 15, high = b[128 + 32 * half + j] >> (2 * part) & 3;
  return half_of(b + 208) * (signed char)b[192 + i / 16] * (low + 16 * high - 32);
}
static double value_of(dequantize::nf4, const unsigned char* b, int i) { return float_of(b) * dequantize::NF4[nibble_of(b + 4 + i / 32 * 16, i % 32)]; }
static double value_of(dequantize::affine4, const unsigned char* b, int i) { return float_of(b) * nibble_of(b + 8, i) + float_of(b + 4); }
static double value_of(dequantize::affine8, const unsigned char* b, int i) { return float_of(b) * b[8 + i] + float_of(b + 4); }

// Random bits but for the scales at `places`, each an f16, or an f32.
template <class K, class T> void check_dequantize(const char* name, std::vector<int> places, bool wide) {
  const int per = 352 / K::len + 1, n = 5, k = per * K::len, blocks = n * per, count = blocks * K::len;
  std::vector<float> aligned(blocks * K::bytes / 4 + 1);
  auto* bytes = (unsigned char*)aligned.data();
  for (int i = 0; i < blocks * K::bytes; i++) bytes[i] = (int)((uniform() + 1) * 128) & 255;
  for (int block = 0; block < blocks; block++)
    for (int place : places) {
      auto* at = bytes + block * K::bytes + place;
      if (wide) *(float*)at = uniform();
      else *(F16*)at = elements::narrow<F16>(uniform());
    }
  Array<T> w(count, false);
  Doubles want;
  for (int i = 0; i < count; i++) want.push_back(value_of(K(), bytes + i / K::len * K::bytes, i % K::len));
  launch({3}, 32, 0, false, [&](unsigned char*) { dequantize::run<K, T>({bytes, w.data(), count}); });
  compare(name, w, want);
  for (int m : {1, 3}) {
    Array<T> x(m * k), y(m * n, false);
    Array<float> bias(n);
    Doubles xs = x.get(), bs = bias.get(), products;
    for (int i = 0; i < m * n; i++) {
      double sum = bs[i % n];
      for (int at = 0; at < k; at++) sum += xs[i / n * k + at] * want[i % n * k + at];
      products.push_back(sum);
    }
    few_rows::Args args = {x.data(), bytes, bias.data(), y.data(), k, n, m};
    launch({(n + 1) / 2}, 64, 0, true, [&](unsigned char*) { m == 1 ? few_rows::forward<K, T, 1>(args) : few_rows::forward<K, T, 4>(args); });
    compare(name, y, products);
  }
}

template <class T> void check_dequantize_all() {
  using namespace dequantize;
  check_dequantize<q8_0, T>("q8_0", {0}, false), check_dequantize<q4_0, T>("q4_0", {0}, false);
  check_dequantize<q4_1, T>("q4_1", {0, 2}, false), check_dequantize<q5_0, T>("q5_0", {0}, false);
  check_dequantize<q5_1, T>("q5_1", {0, 2}, false), check_dequantize<q4_k, T>("q4_k", {0, 2}, false);
  check_dequantize<q5_k, T>("q5_k", {0, 2}, false), check_dequantize<q6_k, T>("q6_k", {208}, false);
  check_dequantize<nf4, T>("nf4", {0}, true), check_dequantize<affine4, T>("affine4", {0, 4}, true);
  check_dequantize<affine8, T>("affine8", {0, 4}, true);
}

template <class T> void types() {
  check_dequantize_all<T>();
  check_swiglu<false, T, 1>(213, false), check_swiglu<false, T, 8>(1304, true);
  check_swiglu<true, T, 1>(213, true), check_swiglu<true, T, 8>(1304, false);
  check_rope<T, 1>(5, 3, 7, 1), check_rope<T, 8>(4, 2, 16, -1);
  for (bool residual : {false, true}) {
    check_rms_norm<T, float, 1>(5, 77, 2, residual), check_rms_norm<T, float, 8>(3, 600, 1, residual);
    check_rms_norm<T, T, 8>(4, 136, 3, residual), check_rms_norm<T, T, 1>(7, 9, 1, residual);
  }
  check_dora<T, 1>(5, 43, true), check_dora<T, 1>(1, 3, false), check_dora<T, 8>(7, 600, true), check_dora<T, 8>(2, 16, false);
  check_dora_norms<T>(43);
  check_embedding<T, 1>(43), check_embedding<T, 8>(296);
  check_cross_entropy<float, T, 1>(3, 211, 3), check_cross_entropy<float, T, 1>(2, 5, 2);
}

int main() {
  types<float>(), types<F16>(), types<Bf16>();
  check_cross_entropy<F16, Bf16, 8>(3, 1208, 3, true), check_cross_entropy<F16, Bf16, 8>(2, 40, 2, true);
  check_adamw(301), check_adamw(7);
  printf("%d comparisons, %d failed\n", cases, failures);
  return failures != 0;
}
