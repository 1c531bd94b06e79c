// Memory that Python names by its address, of tensors or of NumPy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "tokens/rows.h"

namespace expertd {

using Address = std::uintptr_t;
using Place = std::pair<Address, std::ptrdiff_t>;  // of a matrix: bytes from one row to the next

// Safe as far as the caller's word: the address of `Value`s that the caller owns and keeps alive during the call.
template <typename Value>
Value* at(Address address) {
  return reinterpret_cast<Value*>(address);  // NOLINT(performance-no-int-to-ptr)
}

template <typename Value>
std::span<const Value> values(Address address, std::size_t count) {
  return {at<const Value>(address), count};
}

inline Rows rows(const Place& place) { return {at<const std::byte>(place.first), place.second}; }
inline WritableRows writable(const Place& place) { return {at<std::byte>(place.first), place.second}; }

}  // namespace expertd
