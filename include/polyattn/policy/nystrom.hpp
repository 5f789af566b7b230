#pragma once
// What Nystrom attention is told, on every backend: its parameters, and the checks of a call.

#include <polyattn/call_options.hpp>
#include <polyattn/policy/compression/compression.hpp>

POLYATTN_BEGIN_NAMESPACE

/// Parameters of NystromAttention and CudaNystromAttention.
struct Nystrom {
    /// Segments of queries and of keys whose means are the landmarks; fewer if there are fewer tokens.
    index_t landmarks = 64;
    /// Steps towards the pseudo-inverse.
    index_t iterations = 6;
    /// Learned weights [heads][width] of a convolution of V along the tokens, added to the output; width is odd. Empty: none.
    index_t width = 0;
    std::vector<double> table = {};

    void validate() const {
        detail::require(landmarks >= 1, "landmarks", "a number >= 1", landmarks);
        detail::require(iterations >= 0 && iterations <= 64, "iterations", "a number from 0 to 64", iterations);
        detail::require(width == 0 || width % 2 == 1, "width", "0 or an odd number of tokens", width);
        detail::require(width == 0 ? table.empty() : !table.empty() && table.size() % static_cast<std::size_t>(width) == 0, "table", [&] { return detail::text("width ", width, " weights a head"); }, table.size());
        for (const double weight : table) detail::require(detail::is_finite(weight), "table", "finite weights", "one that is not");
    }
    /// Tokens of a segment; the last may have fewer.
    index_t segment_length(index_t tokens) const { return detail::segments(tokens, landmarks); }
    void check_heads(index_t heads) const {
        const std::size_t wanted = static_cast<std::size_t>(width) * static_cast<std::size_t>(heads);
        detail::require(table.empty() || table.size() == wanted, "table", [&] { return detail::text(wanted, " weights for ", heads, " heads"); }, table.size());
    }
};

namespace detail {

/// Throws invalid_input for a call that Nystrom attention does not take.
template <class T>
void check_nystrom(const Nystrom& parameters, const TensorView<const T>& q, const TensorView<const T>& k, const TensorView<const T>& v, const CallOptions& options) {
    check_self_attention(q, k, v, options);
    require(options.dropout.weights == 0 && options.dropout.values == 0, "dropout", "none: rows are products of three matrices", "one");
    parameters.check_heads(q.heads());
}

}  // namespace detail

POLYATTN_END_NAMESPACE
