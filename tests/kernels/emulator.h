// The machine that kernels/cuda/src asks for, played by a CPU: a thread of a block is one that
// calls the kernel, after `kip_be`.
#define KIP_EMULATED
#define KIP_KERNEL(blocks) extern "C" void
#define KIP_SHARED(name) double* name = me.shared

#include <pthread.h>

#include <cmath>

namespace kip {
thread_local struct {
  int thread, block, blocks;
  double* shared;
  pthread_barrier_t* barrier;
} me;

inline int thread() { return me.thread; }
inline int block() { return me.block; }
inline int blocks() { return me.blocks; }
inline void sync() {
  if (me.barrier) pthread_barrier_wait(me.barrier);
}

// As wrong as the GPU's may be, by turns.
inline float approximate(float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x) * 2654435761u;
  return x * (1 + (float(bits >> 8) / (1 << 23) - 1) * 1.2e-7f);
}
inline float inverse_root(float x) { return approximate(1 / std::sqrt(x)); }
inline float reciprocal(float x) { return approximate(1 / x); }
inline double inverse_root(double x) { return 1 / std::sqrt(x); }
inline double reciprocal(double x) { return 1 / x; }
inline float square_root(float x) { return std::sqrt(x); }
inline double square_root(double x) { return std::sqrt(x); }
}  // namespace kip

extern "C" void kip_be(int thread, int block, int blocks, double* shared, void* barrier) {
  kip::me = {thread, block, blocks, shared, static_cast<pthread_barrier_t*>(barrier)};
}
extern "C" void* kip_new_barrier(int threads) {
  auto* barrier = new pthread_barrier_t;
  pthread_barrier_init(barrier, nullptr, threads);
  return barrier;
}
