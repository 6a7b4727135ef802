#include "png_file.hpp"

#include <png.h>

#include <csetjmp>
#include <cstdio>
#include <memory>
#include <stdexcept>

namespace {

constexpr std::uint32_t most_pixels = 64'000'000;

struct Close {
    void operator()(std::FILE* file) const { std::fclose(file); }
};

// Whether the whole file was written. libpng leaves by longjmp: nothing here needs a destructor.
bool write_rows(std::FILE* stream, std::uint32_t height, std::uint32_t width, png_bytepp rows, png_text* text) {
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
    png_infop info = png ? png_create_info_struct(png) : nullptr;
    volatile bool written = false;
    if (info && !setjmp(png_jmpbuf(png))) {
        png_init_io(png, stream);
        png_set_IHDR(png, info, width, height, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_BASE, PNG_FILTER_TYPE_BASE);
        png_set_text(png, info, text, 1);
        png_set_rows(png, info, rows);
        png_write_png(png, info, PNG_TRANSFORM_IDENTITY, nullptr);
        written = true;
    }
    png_destroy_write_struct(&png, &info);
    return std::fflush(stream) == 0 && written;
}

}  // namespace

Picture read_png(const std::string& file) {
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    if (!png_image_begin_read_from_file(&image, file.c_str())) throw std::runtime_error(file + ": no PNG that can be read: " + image.message);
    Picture picture{image.height, image.width, {}};
    if (std::uint64_t{image.height} * image.width > most_pixels) {
        png_image_free(&image);
        throw std::runtime_error(file + ": has more than 64 million pixels; shrink it first");
    }
    image.format = PNG_FORMAT_RGB;
    picture.pixels.resize(PNG_IMAGE_SIZE(image));
    const png_color white{255, 255, 255};
    if (!png_image_finish_read(&image, &white, picture.pixels.data(), 0, nullptr)) throw std::runtime_error(file + ": " + image.message);
    return picture;
}

void write_png(const std::string& file, std::uint32_t height, std::uint32_t width, const std::uint8_t* pixels, const std::string& settings) {
    std::string part = file + ".part", key = "dnp", text = settings;
    std::vector<png_bytep> rows(height);
    for (std::uint32_t y = 0; y < height; ++y) rows[y] = const_cast<png_bytep>(pixels + std::size_t{3} * width * y);
    std::unique_ptr<std::FILE, Close> stream(std::fopen(part.c_str(), "wb"));
    if (!stream) throw std::runtime_error(file + ": cannot be written");
    png_text chunk{};
    chunk.compression = PNG_ITXT_COMPRESSION_NONE, chunk.key = key.data(), chunk.text = text.data();
    bool written = write_rows(stream.get(), height, width, rows.data(), &chunk);
    stream.reset();
    if (!written || std::rename(part.c_str(), file.c_str()) != 0) {
        std::remove(part.c_str());
        throw std::runtime_error(file + ": cannot be written");
    }
}
