// Buffers aligned for vectors.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace kip {

using Index = std::ptrdiff_t;

// An array of `size` zeros, movable but not copyable; `data` is null where size is 0.
template <class V>
class Buffer {
 public:
  explicit Buffer(std::size_t size = 0) : size_(size) {
    if (!size) return;
    constexpr std::size_t alignment = 64;
    const std::size_t bytes = (size * sizeof(V) + alignment - 1) / alignment * alignment;
    data_ = static_cast<V*>(std::aligned_alloc(alignment, bytes));
    if (!data_) throw std::bad_alloc();
    std::memset(data_, 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  V* data() { return data_; }
  const V* data() const { return data_; }
  std::size_t size() const { return size_; }
  V& operator[](std::size_t i) { return data_[i]; }
  const V& operator[](std::size_t i) const { return data_[i]; }

  // Sets all to zero.
  void clear() {
    if (size_) std::memset(data_, 0, size_ * sizeof(V));
  }

 private:
  V* data_ = nullptr;
  std::size_t size_;
};

}  // namespace kip
