#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace inferos::kv {

// Makes room for `more` elements, so that adding them cannot fail; keeps the growth of repeated calls amortised.
template <class T>
void make_room(std::vector<T>& list, std::size_t more) {
  if (list.size() + more > list.capacity()) list.reserve(std::max(list.size() + more, 2 * list.capacity()));
}

template <class T>
void drop_front(std::vector<T>& list, std::size_t count) noexcept {
  list.erase(list.begin(), list.begin() + static_cast<std::ptrdiff_t>(count));
}

}  // namespace inferos::kv
