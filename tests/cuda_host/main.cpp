// The LoRA kernels of src/backend/cuda, run on the CPU and compared with plain f64 loops.
#include "emulate.h"

#include "../../src/backend/cuda/fused_lora.cuh"
#include "../../src/backend/cuda/fused_lora_backward.cuh"

static const int JUNK = 40;  // elements of NaN around every matrix: a read or write outside shows
static uint64_t state = 1;
static int cases = 0, failures = 0;

static double uniform() {
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return (double)(state >> 11) / (1ull << 52) - 1;
}

template <class E> struct Matrix {
  typedef typename E::Raw Raw;
  std::vector<Raw> bytes;
  size_t size, skip;
  Matrix(size_t size, bool aligned) : bytes(size + 2 * JUNK), size(size), skip(JUNK) {
    memset(bytes.data(), 0xff, bytes.size() * sizeof(Raw));
    while ((uintptr_t)(bytes.data() + skip) % 16) skip++;
    if (!aligned) skip++;
  }
  Raw* data() { return bytes.data() + skip; }
  void fill() {
    for (size_t i = 0; i < size; i++) set(i, uniform());
  }
  void set(size_t i, double v) {
    if (sizeof(Raw) == 4) { float f = v; memcpy(data() + i, &f, 4); }
    else { uint32_t u = std::is_same<E, F16>::value ? to_f16x2(v, 0) : round_bf16(v); memcpy(data() + i, &u, 2); }
  }
  double get(size_t i) { return E::widen(data()[i]); }
  bool intact() {
    const unsigned char* p = (const unsigned char*)bytes.data();
    for (size_t i = 0; i < bytes.size() * sizeof(Raw); i++)
      if ((i < skip * sizeof(Raw) || i >= (skip + size) * sizeof(Raw)) && p[i] != 0xff) return false;
    return true;
  }
};

template <class E> void compare(const char* what, const char* name, Matrix<E>& got, const std::vector<double>& want) {
  double limit = sizeof(typename E::Raw) == 4 ? 1e-5 : std::is_same<E, F16>::value ? 1e-3 : 8e-3, difference = 0, scale = 0;
  for (size_t i = 0; i < want.size(); i++) {
    double d = fabs(got.get(i) - want[i]);
    difference = d == d ? fmax(difference, d) : INFINITY;
    scale = fmax(scale, fabs(want[i]));
  }
  cases++;
  if (difference / scale > limit || !got.intact()) {
    failures++;
    printf("FAILED %s %s: relative error %.2e over %.0e%s\n", name, what, difference / scale, limit, got.intact() ? "" : ", wrote outside");
  }
}

struct Shape { int m, k, r, n; };

static Dropout dropout_of(bool on) { return {0x123456789abcdefull, 77, (uint32_t)(0.25 * 4294967296.0), on}; }
static double factor(size_t index, bool on) {
  if (!on) return 1;
  uint4 words = philox(index / 4, dropout_of(true));
  return word(words, index % 4) < dropout_of(true).threshold ? 0 : 1 / 0.75;
}

template <class T, class W, int NR, int MT, bool VEC> void check(const char* types, Shape s, bool on, bool add, bool wide, int warps, int stages) {
  auto [m, k, r, n] = s;
  char name[200];
  snprintf(name, sizeof name, "%s m%d k%d r%d n%d NR%d MT%d vec%d dropout%d add%d wide%d warps%d stages%d", types, m, k, r, n, NR, MT, VEC, on, add, wide, warps, stages);
  bool reversed = warps % 4 == 1 || stages == 2;
  Matrix<T> x((size_t)m * k, VEC), g((size_t)m * n, VEC), y((size_t)m * n, VEC), dx((size_t)m * k, VEC);
  Matrix<W> a(k * r, VEC && r % 8 == 0), b(r * n, VEC);
  Matrix<F32> y32((size_t)m * n, VEC), dx32((size_t)m * k, VEC), h(m * r, true), da(k * r, true), db(r * n, true);
  x.fill(), g.fill(), a.fill(), b.fill();
  float scale = 1.75f, kept = on ? 1 / 0.75f : 1;

  std::vector<double> dropped(m * k), want_h(m * r), want_y(m * n), want_u(m * r), want_da(k * r), want_db(r * n), want_dx(m * k);
  for (int i = 0; i < m * k; i++) dropped[i] = x.get(i) * factor(i, on);
  if (add) {
    y.fill(), y32.fill(), dx.fill(), dx32.fill(), da.fill(), db.fill();
    for (int i = 0; i < m * n; i++) want_y[i] = wide ? y32.get(i) : y.get(i);
    for (int i = 0; i < m * k; i++) want_dx[i] = wide ? dx32.get(i) : dx.get(i);
    for (int i = 0; i < k * r; i++) want_da[i] = da.get(i);
    for (int i = 0; i < r * n; i++) want_db[i] = db.get(i);
  }
  for (int i = 0; i < m; i++)
    for (int q = 0; q < r; q++) {
      for (int c = 0; c < k; c++) want_h[i * r + q] += dropped[i * k + c] * a.get(c * r + q);
      for (int c = 0; c < n; c++) want_u[i * r + q] += scale * g.get(i * n + c) * b.get(q * n + c);
    }
  for (int i = 0; i < m; i++)
    for (int q = 0; q < r; q++) {
      double left = want_h[i * r + q], u = want_u[i * r + q];
      for (int c = 0; c < n; c++) {
        want_y[i * n + c] += scale * left * b.get(q * n + c);
        want_db[q * n + c] += scale * left * g.get(i * n + c);
      }
      for (int c = 0; c < k; c++) {
        want_da[c * r + q] += dropped[i * k + c] * u;
        want_dx[i * k + c] += factor(i * k + c, on) * u * a.get(c * r + q);
      }
    }

  std::vector<typename T::Raw> y_before(y.data(), y.data() + y.size);
  std::vector<float> y32_before(y32.data(), y32.data() + y32.size);
  int splits = n > 64 ? 2 : 1, span = ((n + 31) / 32 + splits - 1) / splits * 32, steps = (r + 15) / 16;
  typedef Forward<T, W, NR, MT, VEC> Fwd;
  {
    size_t ring = (size_t)warps * (stages * Fwd::ITEMS * 512 + Fwd::AT * 32 * Fwd::PITCH), sums = (size_t)warps * Fwd::ROWS * Fwd::RANKS * 4;
    size_t shared = MT * steps * Fwd::HT * 512 + (ring > sums ? ring : sums);
    ForwardArgs p = {};
    p.x = x.data(), p.a = a.data(), p.b = b.data(), p.y = wide ? (void*)y32.data() : (void*)y.data(), p.h = h.data();
    p.m = m, p.k = k, p.r = r, p.n = n, p.dropout = dropout_of(on), p.column_span = span, p.stages = stages, p.s = scale, p.kept_scale = kept;
    p.y_f32 = wide, p.add = add, p.a_vec = VEC && r % 8 == 0, p.b_vec = VEC;
    launch({(m + Fwd::ROWS - 1) / Fwd::ROWS, splits}, warps * 32, shared, reversed, [&](unsigned char* shared) { Fwd::run(p, shared); });
    if (wide) compare("y", name, y32, want_y);
    else compare("y", name, y, want_y);
    compare("h", name, h, want_h);
  }
  if constexpr (VEC && MT == 1 && NR <= 2) {
    typedef Short<T, W, 8 * NR, NR == 1 ? 2 : 1> S;
    Matrix<T> z(y.size, VEC);
    Matrix<F32> z32(y.size, VEC);
    memcpy(z.data(), y_before.data(), y.size * sizeof(typename T::Raw));
    memcpy(z32.data(), y32_before.data(), y.size * 4);
    ForwardArgs p = {};
    p.x = x.data(), p.a = a.data(), p.b = b.data(), p.y = wide ? (void*)z32.data() : (void*)z.data(), p.h = h.data();
    p.m = m, p.k = k, p.r = r, p.n = n, p.dropout = dropout_of(on), p.column_span = span, p.s = scale, p.kept_scale = kept;
    p.y_f32 = wide, p.add = add, p.a_vec = r % 8 == 0, p.b_vec = 1;
    int rows = NR == 1 ? 2 : 1;
    launch({(m + rows - 1) / rows, splits}, 64, 16 * S::SUMS * 4, reversed, [&](unsigned char* shared) { S::run(p, (float(*)[S::SUMS])shared); });
    if (wide) compare("y of Short", name, z32, want_y);
    else compare("y of Short", name, z, want_y);
    compare("h of Short", name, h, want_h);
  }
  if (MT != 1 || r > 8 * NR) return;

  int block = warps * WARP_COLUMNS, rows = m > 200 ? 272 : 32, row_blocks = (m + rows - 1) / rows, n_blocks = (n + block - 1) / block, k_blocks = (k + block - 1) / block;
  Matrix<F32> u_parts((size_t)n_blocks * m * r, true), db_parts((size_t)row_blocks * r * n, VEC), da_parts((size_t)row_blocks * r * k, VEC);
  {
    typedef Output<T, W, NR, VEC> Out;
    OutputArgs p = {g.data(), b.data(), h.data(), u_parts.data(), db_parts.data(), m, n, r, 0, rows, stages, VEC, scale};
    size_t shared = Out::BT * Out::RANKS * (size_t)(block * 2 + 64) + Out::SEGMENT * Out::RANK_TILES * FINE * 512 + 2 * warps * 16 * Out::RANKS * 4 + warps * stages * Tiles<T, VEC>::ITEMS * 512;
    launch({n_blocks, row_blocks}, warps * 32, shared, reversed, [&](unsigned char* shared) { Out::run(p, shared); });
  }
  {
    typedef Input<T, W, NR, VEC> In;
    InputArgs p = {x.data(), a.data(), u_parts.data(), wide ? (void*)dx32.data() : (void*)dx.data(), da_parts.data(), m, dropout_of(on), k, r, 0, n_blocks, rows, stages, kept, wide, add};
    size_t shared = warps * 2 * In::RANK_TILES * In::AT * 1024 + In::SEGMENT * (In::RANK_TILES * (FINE + In::UT) * 512 + 64 * In::PITCH) + warps * stages * Tiles<T, VEC>::ITEMS * 512;
    launch({k_blocks, row_blocks}, warps * 32, shared, reversed, [&](unsigned char* shared) { In::run(p, shared); });
    if (wide) compare("dx", name, dx32, want_dx);
    else compare("dx", name, dx, want_dx);
  }
  ReduceArgs p = {{db_parts.data(), da_parts.data()}, {db.data(), da.data()}, {row_blocks, row_blocks}, {n, k}, {0, 1}, {scale, kept}, r, add};
  launch({3, 2}, 64, 0, false, [&](unsigned char*) { reduce(p); });
  compare("da", name, da, want_da);
  compare("db", name, db, want_db);

  // dx of any rank from the parts of u, by the forward kernel with A transposed.
  Matrix<W> at(r * k, VEC);
  for (int c = 0; c < k; c++)
    for (int q = 0; q < r; q++) at.set(q * k + c, a.get(c * r + q));
  if (add) return;
  memset(dx.data(), 0xff, dx.size * sizeof(typename T::Raw));
  ForwardArgs f = {};
  f.b = at.data(), f.y = dx.data(), f.parts = u_parts.data(), f.part_count = n_blocks, f.m = m, f.k = 1, f.r = r, f.n = k, f.dropout = dropout_of(on);
  f.column_span = (k + 31) / 32 * 32, f.stages = stages, f.s = kept, f.kept_scale = 1, f.b_vec = VEC;
  size_t sums = (size_t)warps * Fwd::ROWS * Fwd::RANKS * 4;
  launch({(m + Fwd::ROWS - 1) / Fwd::ROWS, 1}, warps * 32, MT * steps * Fwd::HT * 512 + sums, reversed, [&](unsigned char* shared) { Fwd::run(f, shared); });
  compare("dx from parts", name, dx, want_dx);
}

template <class T, class W> void types(const char* name) {
  check<T, W, 2, 1, true>(name, {37, 136, 16, 200}, true, false, false, 4, 3);
  check<T, W, 2, 1, true>(name, {37, 136, 11, 200}, false, true, true, 3, 2);
  check<T, W, 1, 1, true>(name, {33, 264, 8, 72}, false, false, false, 5, 4);
  check<T, W, 1, 1, true>(name, {1, 64, 3, 40}, true, true, false, 2, 1);
  check<T, W, 4, 1, true>(name, {20, 72, 32, 264}, false, false, true, 2, 2);
  check<T, W, 8, 1, true>(name, {20, 72, 64, 136}, true, false, false, 2, 2);
  check<T, W, 8, 1, true>(name, {17, 40, 136, 72}, false, false, false, 2, 2);
  check<T, W, 1, sizeof(typename T::Raw) == 2 && T::TERMS == 1 ? 4 : 2, true>(name, {70, 320, 8, 96}, false, true, false, 3, 2);
  check<T, W, 2, T::TERMS == 1 ? 4 : 2, true>(name, {70, 320, 16, 96}, true, false, false, 4, 3);
  if constexpr (T::TERMS == 1) check<T, W, 8, 2, true>(name, {70, 96, 64, 96}, true, false, false, 2, 2);
  check<T, W, 4, 2, true>(name, {70, 96, 32, 96}, false, false, false, 2, 2);
  check<T, W, 2, 1, true>(name, {290, 72, 16, 72}, true, false, false, 2, 3);
  check<T, W, 2, 1, false>(name, {37, 131, 5, 203}, true, false, false, 3, 1);
  check<T, W, 2, 1, false>(name, {19, 35, 16, 67}, false, true, true, 2, 1);
  check<T, W, 8, 1, false>(name, {19, 35, 61, 67}, true, false, false, 2, 1);
  check<T, W, 8, 1, false>(name, {19, 35, 131, 67}, false, false, false, 2, 1);
}

// Known answer of Random123 (kat_vectors, philox4x32 10), as in src/backend/dropout.rs.
static void check_philox() {
  uint4 words = philox(0, {0, 0, 0, 1});
  cases++;
  if (words.x != 0x6627e8d5 || words.y != 0xe169c58d || words.z != 0xbc57ac4c || words.w != 0x9b00dbd8) {
    failures++;
    printf("FAILED philox\n");
  }
}

int main() {
  check_philox();
  types<Bf16, Bf16>("bf16");
  types<Bf16, F32>("bf16, f32 adapter");
  types<F16, F16>("f16");
  types<F16, F32>("f16, f32 adapter");
  types<F32, F32>("f32");
  printf("%d comparisons, %d failed\n", cases, failures);
  return failures != 0;
}
