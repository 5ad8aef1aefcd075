#include <cstring>

#include "kernels/tables.hpp"

namespace inferos::kernels::scalar {
namespace {

std::uint64_t fold(const std::byte* p, std::size_t n) noexcept {
  std::uint64_t all = 0;
  for (std::size_t i = 0; i < n; i += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, p + i, sizeof(word));
    all ^= word;
  }
  return all;
}

}  // namespace

const Read kRead{Isa::kScalar, fold};

}  // namespace inferos::kernels::scalar
