// Philox4x32-10: random numbers that depend on (seed, stream, offset) only.
#pragma once

#include <cstdint>

namespace fastppo {

// The uniform number in (0, 1) of fastppo/ops/philox.py, bit for bit (Salmon et al. 2011): key = seed, counter =
// (offset, stream), each of two 32-bit words; the upper 23 bits of the first word, plus one half.
inline double uniform(uint64_t seed, uint64_t stream, uint64_t offset) {
  uint32_t counter[4] = {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
                         static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter[0] = static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<uint32_t>(b);
    counter[2] = static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<uint32_t>(a);
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return ((counter[0] >> 9) + 0.5) * 0x1p-23;
}

}  // namespace fastppo
