#pragma once

#include <polyattn/core/config.hpp>

#include <cmath>
#include <concepts>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
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

/// A string or a number.
class TextPart {
public:
    TextPart(const char* text) : string_(text) {}
    TextPart(const std::string& text) : string_(text) {}
    template <std::signed_integral T>
    TextPart(T number) : kind_(Kind::whole), whole_(number) {}
    template <std::unsigned_integral T>
    TextPart(T number) : kind_(Kind::natural), natural_(number) {}
    template <std::floating_point T>
    TextPart(T number) : kind_(Kind::real), real_(static_cast<double>(number)) {}

    void append_to(std::string& text) const {
        switch (kind_) {
            case Kind::string: text += string_; break;
            case Kind::whole: text += std::to_string(whole_); break;
            case Kind::natural: text += std::to_string(natural_); break;
            case Kind::real: text += std::to_string(real_); break;
        }
    }

private:
    enum class Kind { string, whole, natural, real };
    Kind kind_ = Kind::string;
    std::string_view string_;
    long long whole_ = 0;
    unsigned long long natural_ = 0;
    double real_ = 0;
};

/// Joins strings and numbers. The work is out of line: checks are many, and messages need no speed.
POLYATTN_NOINLINE inline std::string joined(std::initializer_list<TextPart> parts) {
    std::string text;
    for (const TextPart& part : parts) part.append_to(text);
    return text;
}
template <class... Parts>
std::string text(const Parts&... parts) {
    return joined({TextPart(parts)...});
}

[[noreturn]] POLYATTN_NOINLINE inline void refuse(const char* argument, TextPart wanted, TextPart got) { throw invalid_input(argument, joined({wanted}), joined({got})); }

/// Throws unless `ok`. `wanted` may be a function that makes the text, so that a check that passes allocates nothing.
template <class Wanted, class Got>
void require(bool ok, const char* argument, const Wanted& wanted, const Got& got) {
    if (ok) return;
    if constexpr (std::is_invocable_v<Wanted>) refuse(argument, wanted(), got);
    else refuse(argument, wanted, got);
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
