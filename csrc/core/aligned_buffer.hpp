#pragma once
// The only place that takes memory from the operating system.

#include <cstddef>

namespace inferos {

inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

// Whole pages, zeroed, at least 64-byte aligned; aligned to 2 MiB where huge pages were asked for. Given back by the destructor.
class AlignedBuffer {
 public:
  AlignedBuffer() noexcept = default;
  // `bytes` is rounded up to pages. `huge`: ask for huge pages where `bytes` is a multiple of 2 MiB; a refusal is no error.
  // An empty buffer where the system has no memory left.
  static AlignedBuffer map(std::size_t bytes, bool huge) noexcept;
  ~AlignedBuffer();
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;

  std::byte* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  bool huge() const noexcept { return huge_; }  // the system accepted the advice

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  bool huge_ = false;
};

std::size_t page_bytes() noexcept;

}  // namespace inferos
