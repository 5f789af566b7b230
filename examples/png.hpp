#pragma once

#include <polyattn/plan/picture.hpp>

#include <string>

/// Writes a grey PNG. Throws std::runtime_error if the file can't be written.
void write_png(const std::string& path, const polyattn::Picture& picture);
