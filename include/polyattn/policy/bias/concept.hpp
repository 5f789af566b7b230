#pragma once

#include <polyattn/core/error.hpp>
#include <polyattn/policy/concept.hpp>

#include <span>
#include <string>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

/// A BiasPolicy adds bias(batch, head, query, key) to the scaled scores, in natural-log units; indices are the tensors' own.
/// A bias of -infinity removes the pair. Optional members:
/// - bind(queries, keys): a bound copy of the bias that is called instead; for biases that measure distances, since query i
///   stands at position i + keys - queries.
/// - gradient_size() and accumulate_gradient(span<double> gradient, batch, head, query, key, double d_score): the bias is
///   learned, and backward() returns its gradient. Cuda needs offset_t entry(batch, head, query, key), POLYATTN_HOST_DEVICE, instead: the entry that a pair adds to.
/// - depends_on_distance, a static constexpr true, of the bound bias where there is one: it depends on batch, head and key - query
///   alone. Kernels then evaluate it once a distance.
template <class P>
concept BiasPolicy = PolicyOf<P, bias_kind> && (requires(const P& bias, index_t i) { { bias(i, i, i, i) } -> std::convertible_to<double>; } ||
                                                requires(const P& bias, index_t i) { { bias.bind(i, i)(i, i, i, i) } -> std::convertible_to<double>; });

template <class P>
concept LearnedBias = requires(const P& bias, std::span<double> gradient, index_t i, double value) {
    { bias.gradient_size() } -> std::convertible_to<std::size_t>;
    bias.accumulate_gradient(gradient, i, i, i, i, value);
};

template <class P>
concept DistanceBias = requires { requires P::depends_on_distance; };

/// No bias; costs nothing.
struct NoBias {
    using policy_kind = bias_kind;
    POLYATTN_HOST_DEVICE constexpr double operator()(index_t, index_t, index_t, index_t) const { return 0; }
};

namespace detail {

/// The bound bias, or a reference to the bias itself.
template <class P>
decltype(auto) bind_bias(const P& bias, index_t queries, index_t keys) {
    if constexpr (requires { bias.bind(queries, keys); }) return bias.bind(queries, keys);
    else return (bias);
}

/// Throws unless a table of `size` entries, all finite, is there.
inline void require_table(std::span<const double> table, std::size_t size, const char* argument) {
    require(table.size() == size, argument, [&] { return detail::text(size, " entries"); }, table.size());
    for (const double entry : table) require(is_finite(entry), argument, "finite entries", "one that is not");
}

}  // namespace detail

static_assert(BiasPolicy<NoBias>);

POLYATTN_END_NAMESPACE
