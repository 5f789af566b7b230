#pragma once

#include <polyattn/core/config.hpp>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

POLYATTN_BEGIN_NAMESPACE

/// Thrown for every input the library refuses: shapes, parameters, tables, edge lists.
/// Names the argument, what was wanted and what came.
class invalid_input : public std::invalid_argument {
public:
    invalid_input(std::string argument, std::string wanted, std::string got)
        : std::invalid_argument(std::string("polyattn: ").append(argument).append(": wanted ").append(wanted).append(", got ").append(got)),
          argument_(std::move(argument)), wanted_(std::move(wanted)), got_(std::move(got)) {}

    const std::string& argument() const noexcept { return argument_; }
    const std::string& wanted() const noexcept { return wanted_; }
    const std::string& got() const noexcept { return got_; }

private:
    std::string argument_, wanted_, got_;
};

namespace detail {

/// Joins strings and numbers.
template <class... Parts>
std::string text(const Parts&... parts) {
    std::string joined;
    const auto add = [&](const auto& part) {
        if constexpr (std::is_arithmetic_v<std::decay_t<decltype(part)>>) joined += std::to_string(part);
        else joined += part;
    };
    (add(parts), ...);
    return joined;
}

/// Throws unless `ok`. `wanted` may be a function that makes the text, so that a check that passes allocates nothing.
template <class Wanted, class Got>
void require(bool ok, const char* argument, const Wanted& wanted, const Got& got) {
    if (ok) return;
    if constexpr (std::is_invocable_v<Wanted>) throw invalid_input(argument, wanted(), text(got));
    else throw invalid_input(argument, wanted, text(got));
}

/// Finite by its bits: std::isfinite folds to true under -ffast-math.
inline bool is_finite(double value) {
    std::uint64_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits >> 52 & 0x7ff) != 0x7ff;
}
inline bool is_finite(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits >> 23 & 0xff) != 0xff;
}

/// Not a number, by its bits as well.
template <class T>
bool is_nan(T value) {
    if (is_finite(value)) return false;
    std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t> bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & ((decltype(bits){1} << (sizeof(T) == 4 ? 23 : 52)) - 1)) != 0;
}

/// A finite number in [low, high]; NaN and infinities are named as such even under -ffast-math.
inline void require_in_range(double value, double low, double high, const char* argument, const char* wanted) {
    require(is_finite(value) && value >= low && value <= high, argument, wanted,
            is_finite(value) ? std::to_string(value) : std::string("a value that is not finite"));
}

}  // namespace detail

POLYATTN_END_NAMESPACE
