#pragma once
// Choice of a kernel table at run time. A family lists its tables in the order of core/cpu.hpp's Isa, scalar first.

#include <cstddef>
#include <span>

#include "core/cpu.hpp"

namespace inferos::kernels {

// The leading tables that this CPU can run.
template <class Table>
std::span<const Table> runnable_of(std::span<const Table> all) noexcept {
  std::size_t n = 1;
  while (n < all.size() && isa_runnable(all[n].isa)) ++n;
  return all.first(n);
}

// The table of active_isa(). Throws Error{kConfig} as active_isa() does.
template <class Table>
const Table& active_of(std::span<const Table> runnable) {
  const Isa wanted = active_isa();
  std::size_t i = runnable.size() - 1;
  while (i > 0 && runnable[i].isa > wanted) --i;
  return runnable[i];
}

}  // namespace inferos::kernels
