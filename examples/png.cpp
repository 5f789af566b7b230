#include "png.hpp"

#include <stdexcept>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image_write.h>

void write_png(const std::string& path, const polyattn::Picture& picture) {
    if (!stbi_write_png(path.c_str(), picture.width, picture.height, 1, picture.pixels.data(), picture.width))
        throw std::runtime_error("can't write " + path);
}
