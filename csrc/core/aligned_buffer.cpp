#include "core/aligned_buffer.hpp"

#include <cstdint>
#include <utility>

#if defined(_WIN32)
#include "core/windows.hpp"
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace inferos {
namespace {

std::size_t round_up(std::size_t value, std::size_t step) noexcept { return (value + step - 1) / step * step; }

#if defined(_WIN32)

// Large pages need a privilege that a normal user does not have: plain pages, 64 KiB aligned.
std::byte* take(std::size_t bytes, bool /*align_huge*/) noexcept {
  return static_cast<std::byte*>(VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE));
}
void give(std::byte* data, std::size_t /*bytes*/) noexcept { VirtualFree(data, 0, MEM_RELEASE); }
bool advise_huge(std::byte* /*data*/, std::size_t /*bytes*/) noexcept { return false; }

#else

std::byte* map_pages(std::size_t bytes) noexcept {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : static_cast<std::byte*>(data);
}

void give(std::byte* data, std::size_t bytes) noexcept { munmap(data, bytes); }

std::byte* take(std::size_t bytes, bool align_huge) noexcept {
  if (!align_huge) return map_pages(bytes);
  // mmap aligns to small pages only: map 2 MiB more and give the ends back.
  std::byte* wide = map_pages(bytes + kHugePageBytes);
  if (wide == nullptr) return nullptr;
  const std::size_t offset = reinterpret_cast<std::uintptr_t>(wide) % kHugePageBytes;
  const std::size_t front = offset == 0 ? 0 : kHugePageBytes - offset;
  if (front != 0) give(wide, front);
  if (front != kHugePageBytes) give(wide + front + bytes, kHugePageBytes - front);
  return wide + front;
}

bool advise_huge([[maybe_unused]] std::byte* data, [[maybe_unused]] std::size_t bytes) noexcept {
#if defined(MADV_HUGEPAGE)
  return madvise(data, bytes, MADV_HUGEPAGE) == 0;
#else
  return false;
#endif
}

#endif

}  // namespace

std::size_t page_bytes() noexcept {
#if defined(_WIN32)
  return 65536;  // the granularity of VirtualAlloc: less would only waste address space
#else
  static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
#endif
}

AlignedBuffer AlignedBuffer::map(std::size_t bytes, bool huge) noexcept {
  AlignedBuffer buffer;
  const std::size_t size = round_up(bytes, page_bytes());
  if (size < bytes || size > SIZE_MAX - kHugePageBytes) return buffer;
  const bool whole = huge && size != 0 && size % kHugePageBytes == 0;
  buffer.data_ = take(size, whole);
  if (buffer.data_ == nullptr) return buffer;
  buffer.size_ = size;
  buffer.huge_ = whole && advise_huge(buffer.data_, size);
  return buffer;
}

AlignedBuffer::~AlignedBuffer() {
  if (data_ != nullptr) give(data_, size_);
}

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      huge_(std::exchange(other.huge_, false)) {}

AlignedBuffer& AlignedBuffer::operator=(AlignedBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(huge_, other.huge_);
  return *this;
}

}  // namespace inferos
