#pragma once

#include <polyattn/core/view.hpp>
#include <polyattn/policy/concept.hpp>

POLYATTN_BEGIN_NAMESPACE

struct compression_kind {};

/// What is being compressed: a learned compression has weights of its own for each.
enum class Compressed { keys, values };

/// A CompressionPolicy shortens the keys and values of a head along the tokens; queries then see these landmarks alone. Members:
/// - index_t landmarks(index_t tokens) const: rows that so many tokens become; 0 for 0 tokens, never fewer for more tokens.
/// - template <class T> void compress(MatrixView<const T> x, Compressed what, MatrixView<T> y) const: y [landmarks(x.rows), x.cols] from the valid
///   rows x.
/// - template <class T> void compress_adjoint(MatrixView<const T> x, Compressed what, MatrixView<const T> d_y, MatrixView<T> d_x, std::span<double> d_table)
///   const: adds to d_x, and to d_table if the compression is learned.
/// - static constexpr bool is_linear: y is a linear map of x along the tokens; diffusion needs it.
/// Optional:
/// - a `std::vector<double> table`: learned weights, whose gradient backward() returns.
/// - bind(MatrixView<const T> keys): a compression that depends on the keys; the bound copy is called instead.
/// - void check_tokens(index_t tokens) const: throws invalid_input for numbers of tokens that don't fit.
template <class P>
concept CompressionPolicy = PolicyOf<P, compression_kind> && requires(const P& policy, index_t tokens) {
    { policy.landmarks(tokens) } -> std::same_as<index_t>;
    { P::is_linear } -> std::convertible_to<bool>;
};

/// Keys and values as they are.
struct NoCompression {
    using policy_kind = compression_kind;
    static constexpr bool is_linear = true;
    index_t landmarks(index_t tokens) const { return tokens; }
};

static_assert(CompressionPolicy<NoCompression>);

/// Means of L consecutive tokens; see compression.hpp.
template <index_t... L>
struct SegmentMeans;

namespace detail {

template <class P>
inline constexpr std::size_t segment_lengths = 0;
template <index_t... L>
inline constexpr std::size_t segment_lengths<SegmentMeans<L...>> = sizeof...(L);

template <class P, class T>
decltype(auto) bind_compression(const P& policy, const MatrixView<const T>& keys) {
    if constexpr (requires { policy.bind(keys); }) return policy.bind(keys);
    else return (policy);
}
template <class P>
concept LearnedCompression = requires(P policy) { policy.table.assign(std::size_t{}, double{}); };

}  // namespace detail

POLYATTN_END_NAMESPACE
