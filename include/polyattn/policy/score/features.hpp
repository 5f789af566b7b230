#pragma once
// Feature maps of kernel attention: what stands for exp(q . k) is phi(q) . phi(k).

#include <polyattn/core/error.hpp>
#include <polyattn/core/memory.hpp>
#include <polyattn/core/normal.hpp>
#include <polyattn/core/rng.hpp>

#include <cmath>
#include <concepts>
#include <memory>
#include <mutex>
#include <numbers>
#include <tuple>
#include <vector>

POLYATTN_BEGIN_NAMESPACE

/// phi(x) = max(x, 0), entry by entry; its derivative at 0 is 0. Source: AdaMRA (2021), equation 10.
struct ReLU {
    POLYATTN_HOST_DEVICE double operator()(double x) const { return x < 0 ? 0 : x; }
    POLYATTN_HOST_DEVICE double derivative(double x) const { return x > 0 ? 1 : 0; }
};

/// phi(x) = x + 1 for x > 0, else e^x. Source: Katharopoulos et al., "Transformers are RNNs" (2020), equation 7.
struct EluPlusOne {
    POLYATTN_HOST_DEVICE double operator()(double x) const { return x > 0 ? x + 1 : std::exp(x); }
    POLYATTN_HOST_DEVICE double derivative(double x) const { return x > 0 ? 1 : std::exp(x); }
};

/// A map of single entries: phi(x) >= 0 and its derivative (POLYATTN_HOST_DEVICE for the backend Cuda). Kernels call it entry by entry, or with whole vectors if it has the templates
/// `V vector(V x)` and `V vector_derivative(V x)` for xsimd batches.
template <class F>
concept ElementwiseFeatures = std::copy_constructible<F> && requires(const F& map, double x) {
    { map(x) } -> std::convertible_to<double>;
    { map.derivative(x) } -> std::convertible_to<double>;
};

namespace detail {

/// Random directions w_1 .. w_m and what is subtracted from exponents, for one dimension. phi_r(x) = exp(w_r . y - |y|^2 / 2 - c) / sqrt(m) with
/// y = x d^(-1/4).
struct RandomDirections {
    index_t dim = 0, count = 0;
    bool orthogonal = true;
    std::uint64_t seed = 0;
    std::vector<double> w;  // [count][dim]
    /// max |w|^2 / 4: no exponent exceeds |w|^2 / 2, and a fixed c is all that causality allows. Layers refuse dimensions for which
    /// features of small keys would underflow then: float above some 250.
    double fixed_shift = 0;
    /// The same as kernels read them, in rows of whole 64-byte lines, zeros at their ends: w d^(-1/4) log2(e) as [dim][features], w d^(-1/4) as [count][inputs].
    template <class T>
    struct Tables {
        index_t features = 0, inputs = 0;
        AlignedVector<T> to_exponents, to_inputs;
    };
    template <class T>
    const Tables<T>& tables() const {
        return std::get<Tables<T>>(tables_);
    }

    RandomDirections(index_t d, index_t m, bool in_blocks, std::uint64_t from) : dim(d), count(m), orthogonal(in_blocks), seed(from), w(static_cast<std::size_t>(d) * static_cast<std::size_t>(m)) {
        const auto normal = [](RandomRow& random) { return normal_deviate(random.next()) * 0x1p-24; };
        const auto row = [&](index_t r) { return w.data() + static_cast<std::size_t>(r) * static_cast<std::size_t>(d); };
        const auto dot = [&](const double* a, const double* b) {
            double sum = 0;
            for (index_t c = 0; c < d; ++c) sum += a[c] * b[c];
            return sum;
        };
        for (index_t r = 0; r < m; ++r) {
            RandomRow random(seed, static_cast<std::uint32_t>(r), random_stream::feature_directions);
            for (index_t c = 0; c < d; ++c) row(r)[c] = normal(random);
            if (!orthogonal) continue;
            // Gram-Schmidt, twice, within blocks of d rows; then the length of an independent deviate.
            for (int pass = 0; pass < 2; ++pass)
                for (index_t before = r / d * d; before < r; ++before) {
                    const double along = dot(row(r), row(before)) / dot(row(before), row(before));
                    for (index_t c = 0; c < d; ++c) row(r)[c] -= along * row(before)[c];
                }
            double length = 0;
            for (index_t c = 0; c < d; ++c) {
                const double deviate = normal(random);
                length += deviate * deviate;
            }
            const double factor = std::sqrt(length / dot(row(r), row(r)));
            for (index_t c = 0; c < d; ++c) row(r)[c] *= factor;
        }
        for (index_t r = 0; r < m; ++r) fixed_shift = std::max(fixed_shift, dot(row(r), row(r)) / 4);
        std::apply([&](auto&... table) { (fill(table), ...); }, tables_);
    }

private:
    template <class T>
    void fill(Tables<T>& to) const {
        constexpr index_t line = 64 / sizeof(T);
        const double scale = std::pow(double(dim), -.25);
        to.features = (count + line - 1) / line * line;
        to.inputs = (dim + line - 1) / line * line;
        to.to_exponents.resize(static_cast<std::size_t>(dim) * static_cast<std::size_t>(to.features));
        to.to_inputs.resize(static_cast<std::size_t>(count) * static_cast<std::size_t>(to.inputs));
        for (std::size_t r = 0; r < static_cast<std::size_t>(count); ++r)
            for (std::size_t c = 0; c < static_cast<std::size_t>(dim); ++c) {
                const double scaled = w[r * static_cast<std::size_t>(dim) + c] * scale;
                to.to_exponents[c * static_cast<std::size_t>(to.features) + r] = static_cast<T>(scaled * std::numbers::log2e);
                to.to_inputs[r * static_cast<std::size_t>(to.inputs) + c] = static_cast<T>(scaled);
            }
    }
    std::tuple<Tables<float>, Tables<double>> tables_;
};

}  // namespace detail

/// phi_r(x) = exp(w_r . y - |y|^2 / 2) / sqrt(m), y = x d^(-1/4), r = 1 .. m: the mean over w of phi(q) . phi(k) is exp(q . k / sqrt(d)). Directions
/// are normal deviates, orthogonal in blocks of d. Exponents are shifted before exp: a query's by its largest, keys' by the largest of
/// the head, which cancels in each row; causal keys' by a constant, since later keys must not matter. Source: Choromanski et al.,
/// "Rethinking attention with Performers" (2021), FAVOR+, equations 5 to 7.
struct PositiveRandomFeatures {
    /// m; 0: d ln d, rounded up (the paper's theorem 4 asks for that order).
    index_t features = 0;
    bool orthogonal = true;
    std::uint64_t seed = 0;

    void validate() const { detail::require(features >= 0, "features", "a number of features >= 0 (0: d ln d)", features); }

    index_t count(index_t dim) const {
        return features > 0 ? features : std::max<index_t>(1, static_cast<index_t>(std::ceil(dim * std::log(double(dim)))));
    }
    /// The directions for a dimension; those of the last one are kept.
    std::shared_ptr<const detail::RandomDirections> bind(index_t dim) const {
        const std::lock_guard lock(cache->mutex);
        const auto& known = cache->directions;
        if (!known || known->dim != dim || known->count != count(dim) || known->orthogonal != orthogonal || known->seed != seed) cache->directions = std::make_shared<const detail::RandomDirections>(dim, count(dim), orthogonal, seed);
        return cache->directions;
    }

    struct Cache {
        std::mutex mutex;
        std::shared_ptr<const detail::RandomDirections> directions;
    };
    /// Not a parameter. Copies share it.
    std::shared_ptr<Cache> cache = std::make_shared<Cache>();
};

template <class F>
concept FeatureMap = ElementwiseFeatures<F> || std::same_as<F, PositiveRandomFeatures>;

static_assert(FeatureMap<ReLU> && FeatureMap<EluPlusOne> && FeatureMap<PositiveRandomFeatures>);

POLYATTN_END_NAMESPACE
