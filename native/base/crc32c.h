// CRC-32C (Castagnoli), as iSCSI and ext4 have it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace expertd {

// Of `size` bytes at `data` that follow bytes with checksum `before`; 0 at the beginning.
std::uint32_t crc32c(std::uint32_t before, const std::byte* data, std::size_t size) noexcept;

}  // namespace expertd
