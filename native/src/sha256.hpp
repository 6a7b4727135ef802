// SHA-256 (FIPS 180-4), fed in pieces.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dnp::core {

class Sha256 {
public:
    void update(const void* data, std::size_t size);
    std::string digest();  // 32 bytes; ends the hash
    std::string hex();     // the same as 64 digits

private:
    void block(const std::uint8_t* data);

    std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<std::uint8_t, 64> pending_{};
    std::uint64_t length_ = 0;  // bytes so far
};

std::string sha256(std::string_view data);

}  // namespace dnp::core
