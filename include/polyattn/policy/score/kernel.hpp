#pragma once

#include <polyattn/policy/concept.hpp>
#include <polyattn/policy/score/features.hpp>

POLYATTN_BEGIN_NAMESPACE

// Denominators: what a row of kernel attention is divided by, phi(q_i) . sum_j phi(k_j), can be 0 (with ReLU it often is).

/// The denominator plus epsilon: a row of zeros becomes 0, and no row sums to 1 exactly. Not for diffusion.
struct AddEpsilon {
    double epsilon = 1e-6;
    void validate() const { detail::require_in_range(epsilon, 0, 1, "epsilon", "a number of [0, 1]"); }
};
/// A row with denominator 0 is a row without keys.
struct ExactOrZero {};
/// A row with denominator 0 is the mean of the values it may see, so that every row with keys sums to 1.
struct ExactOrMean {};
/// AddEpsilon{}; with diffusion ExactOrMean; with PositiveRandomFeatures, which are never 0 and whose size is arbitrary, ExactOrZero, with
/// diffusion ExactOrMean.
struct DefaultDenominator {};

template <class D>
concept Denominator = std::same_as<D, AddEpsilon> || std::same_as<D, ExactOrZero> || std::same_as<D, ExactOrMean> || std::same_as<D, DefaultDenominator>;

/// Kernel (linear) attention: A_ij = phi(q_i) . phi(k_j) / sum_l phi(q_i) . phi(k_l), never formed: O(n f e) for f features and e value columns,
/// O(f e) memory beside the tensors. All keys or, with Causal, those up to the query; diffusion runs on it as on any attention. No 1 / sqrt(d)
/// except inside PositiveRandomFeatures. Sources: Katharopoulos et al. (2020), equations 4 to 9; AdaMRA (2021), equations 8 to 10.
template <class Features = ReLU, class Divisor = DefaultDenominator>
struct Kernel {
    static_assert(FeatureMap<Features>, "polyattn: Kernel<Features> needs ReLU, EluPlusOne, PositiveRandomFeatures or a map with double operator()(double) and double derivative(double)");
    static_assert(Denominator<Divisor>, "polyattn: Kernel<Features, Denominator> needs AddEpsilon, ExactOrZero or ExactOrMean");
    static_assert(!std::same_as<Features, PositiveRandomFeatures> || !std::same_as<Divisor, AddEpsilon>,
                  "polyattn: the size of PositiveRandomFeatures is arbitrary, so an epsilon beside them means nothing; use ExactOrZero or ExactOrMean");
    using policy_kind = score_kind;
    Features features = {};
    Divisor denominator = {};

    void validate() const {
        detail::validate(features);
        detail::validate(denominator);
    }
};

namespace detail {

template <class S>
inline constexpr bool is_kernel = false;
template <class F, class D>
inline constexpr bool is_kernel<Kernel<F, D>> = true;

/// What a zero denominator means.
enum class ZeroRow { epsilon, empty, mean };

template <class F, class D>
ZeroRow zero_row(const Kernel<F, D>&, bool diffuses) {
    if constexpr (std::same_as<D, AddEpsilon>) return ZeroRow::epsilon;
    else if constexpr (std::same_as<D, ExactOrZero>) return ZeroRow::empty;
    else if constexpr (std::same_as<D, ExactOrMean>) return ZeroRow::mean;
    else return diffuses ? ZeroRow::mean : std::same_as<F, PositiveRandomFeatures> ? ZeroRow::empty : ZeroRow::epsilon;
}
template <class F, class D>
double epsilon_of(const Kernel<F, D>& kernel, ZeroRow zero) {
    if constexpr (std::same_as<D, AddEpsilon>) return kernel.denominator.epsilon;
    else return zero == ZeroRow::epsilon ? AddEpsilon{}.epsilon : 0;
}

/// The map, or the directions of random features for a dimension.
template <class F>
auto bind_features(const F& map, [[maybe_unused]] index_t dim) {
    if constexpr (std::same_as<F, PositiveRandomFeatures>) return map.bind(dim);
    else return map;
}
template <class Bound>
inline constexpr bool has_directions = std::same_as<Bound, std::shared_ptr<const RandomDirections>>;

}  // namespace detail

POLYATTN_END_NAMESPACE
