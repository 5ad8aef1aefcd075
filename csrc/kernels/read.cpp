#include "kernels/read.hpp"

#include <array>

#include "kernels/dispatch.hpp"
#include "kernels/tables.hpp"

namespace inferos::kernels {

std::span<const Read> read_runnable() {
  static const std::array all{
      scalar::kRead,
#if defined(INFEROS_X86)
      avx2::kRead,
      avx512vnni::kRead,
#endif
  };
  static const std::span<const Read> runnable = runnable_of(std::span<const Read>(all));
  return runnable;
}

}  // namespace inferos::kernels
