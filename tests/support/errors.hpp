#pragma once

#include <polyattn/core/error.hpp>

#include <string>

/// The argument that the exception of a call names.
template <class Call>
std::string argument(Call&& call) {
    try {
        call();
    } catch (const polyattn::invalid_input& error) {
        return error.argument();
    }
    return "nothing thrown";
}
