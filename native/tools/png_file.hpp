// PNG files, by libpng.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct Picture {
    std::uint32_t height = 0, width = 0;
    std::vector<std::uint8_t> pixels;  // RGB
};

// Throw std::runtime_error, naming the file.
Picture read_png(const std::string& file);
void write_png(const std::string& file, std::uint32_t height, std::uint32_t width, const std::uint8_t* pixels, const std::string& settings);
