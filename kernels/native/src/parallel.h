// Work shared out among threads. No result may depend on which thread does what: units of work are
// fixed, and each writes to places of its own.
#pragma once

#include <xmmintrin.h>

#include <atomic>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace kip {

// Flushes subnormal numbers to zero in this thread while it lives. XLA does so in its own threads;
// all threads must agree, for speed and for equal bits.
class FlushSubnormals {
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) {
    _mm_setcsr(saved_ | kFlushToZero | kSubnormalsAreZero);
  }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 0x8000, kSubnormalsAreZero = 0x0040;
  unsigned saved_;
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
