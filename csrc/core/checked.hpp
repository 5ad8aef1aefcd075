#pragma once
// Arithmetic for sizes that came from a file or a request: throws Error{kShape} instead of wrapping.

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/error.hpp"

namespace inferos {

inline std::size_t checked_mul(std::size_t a, std::size_t b) {
  if (b != 0 && a > std::numeric_limits<std::size_t>::max() / b) {
    throw Error(ErrorCode::kShape, "size overflow: " + std::to_string(a) + " * " + std::to_string(b));
  }
  return a * b;
}

inline std::size_t checked_add(std::size_t a, std::size_t b) {
  if (a > std::numeric_limits<std::size_t>::max() - b) {
    throw Error(ErrorCode::kShape, "size overflow: " + std::to_string(a) + " + " + std::to_string(b));
  }
  return a + b;
}

// `value` as a size, refused outside low..high; `name` goes into the message.
inline std::size_t checked_range(std::int64_t value, std::int64_t low, std::int64_t high, const char* name) {
  if (value < low || value > high) {
    throw Error(ErrorCode::kShape, std::string(name) + ": " + std::to_string(value) + " is not within " +
                                       std::to_string(low) + ".." + std::to_string(high));
  }
  return static_cast<std::size_t>(value);
}

}  // namespace inferos
