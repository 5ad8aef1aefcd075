#pragma once
// Copies of this library in the process. Each has sequences of its own, so a handle from one means nothing to another.

#include <string>

namespace inferos {

// The file this copy was loaded from, by the name it was loaded under first.
std::string own_file();

// The file of a copy that was loaded before this one; empty where there is none. Walks the modules of the process. Thread-safe.
std::string earlier_copy();

}  // namespace inferos
