// Work shared out among threads. No result may depend on which thread does what: units of work are
// fixed, and each writes to places of its own.
#pragma once

#if !defined(__aarch64__)
#include <xmmintrin.h>
#endif

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace kip {

// The register that says how this thread rounds, and the bits of it that flush subnormal numbers.
#if defined(__aarch64__)
using FloatControl = std::uint64_t;
inline constexpr FloatControl kFlush = 1 << 24;  // FPCR.FZ: what operations read and give
inline FloatControl float_control() {
  FloatControl value;
  asm volatile("mrs %0, fpcr" : "=r"(value)::"memory");
  return value;
}
inline void set_float_control(FloatControl value) {
  asm volatile("msr fpcr, %0" ::"r"(value) : "memory");
}
#else
using FloatControl = unsigned;
inline constexpr FloatControl kFlush = 0x8000 | 0x0040;  // MXCSR: what operations give; and read
inline FloatControl float_control() { return _mm_getcsr(); }
inline void set_float_control(FloatControl value) { _mm_setcsr(value); }
#endif

// Flushes subnormal numbers to zero in this thread while it lives. XLA does so in its own threads;
// all threads must agree, for speed and for equal bits.
class FlushSubnormals {
 public:
  FlushSubnormals() : saved_(float_control()) { set_float_control(saved_ | kFlush); }
  ~FlushSubnormals() { set_float_control(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  FloatControl saved_;
};

// Calls f(worker, i) once for each 0 <= i < units, on `workers` threads, this one included, or as
// many as there are. Calls with the same `worker` < workers do not overlap. f must not throw.
template <class F>
void parallel_for(std::size_t workers, Index units, F f) {
  std::atomic<Index> next{0};
  const auto work = [&](std::size_t worker) {
    FlushSubnormals flush;
    for (Index i; (i = next.fetch_add(1)) < units;) f(worker, i);
  };
  std::vector<std::thread> threads;
  threads.reserve(workers);
  try {
    for (std::size_t worker = 1; worker < workers && Index(worker) < units; ++worker)
      threads.emplace_back(work, worker);
  } catch (const std::system_error&) {
    // The threads that could be started do all the work.
  }
  work(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace kip
