#pragma once

#include <polyattn/nn/linear.hpp>

#include <numbers>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// Learning rates over the steps of a training run: linear from 0 over `warmup` steps, then to `last`, along a cosine or a line.
struct LearningRate {
    double peak = 1e-3, last = 0;
    std::int64_t warmup = 0, steps = 0;  // of all of the run
    bool cosine = true;

    void validate() const {
        detail::require(detail::is_finite(peak) && peak > 0, "peak", "a rate > 0", peak);
        detail::require(detail::is_finite(last) && last >= 0 && last <= peak, "last", "a rate from 0 to the peak", last);
        detail::require(steps >= 1, "steps", "a number >= 1", steps);
        detail::require(warmup >= 0 && warmup <= steps, "warmup", "a number of steps from 0 to all", warmup);
    }
    /// Throws invalid_input for a parameter out of range.
    double at(std::int64_t step) const {
        validate();
        if (step < warmup) return peak * double(step + 1) / double(warmup);
        const double done = std::min(1., double(step - warmup) / double(std::max<std::int64_t>(1, steps - warmup)));
        return last + (peak - last) * (cosine ? .5 * (1 + std::cos(std::numbers::pi * done)) : 1 - done);
    }
};

/// Scales all gradients so that their common norm is at most `most`; returns the norm before. Summed in double, in order.
template <class Model>
double clip_gradients(Model& model, double most) {
    detail::require(most > 0, "most", "a norm > 0", most);
    double squares = 0;
    model.for_each_parameter([&](auto& parameter) {
        constexpr offset_t chunk = 4096;
        const auto& values = parameter.gradient.values;
        std::vector<double> parts((values.size() + chunk - 1) / chunk, 0.);
        parallel_for(static_cast<offset_t>(parts.size()), [&](offset_t part, int) {
            double sum = 0;
            for (std::size_t i = static_cast<std::size_t>(part * chunk); i < std::min(values.size(), static_cast<std::size_t>((part + 1) * chunk)); ++i) sum += double(values[i]) * double(values[i]);
            parts[static_cast<std::size_t>(part)] = sum;
        });
        for (const double part : parts) squares += part;
    });
    const double norm = std::sqrt(squares);
    if (norm > most)
        model.for_each_parameter([&](auto& parameter) {
            using T = typename std::remove_cvref_t<decltype(parameter.gradient.values)>::value_type;
            for (T& value : parameter.gradient.values) value *= static_cast<T>(most / norm);
        });
    return norm;
}

/// Adam with decoupled weight decay. State follows the order of the model's parameters. Bitwise the same for any number of threads.
/// Sources: Kingma and Ba, "Adam" (2015); Loshchilov and Hutter, "Decoupled weight decay regularization" (2019).
template <class T>
class AdamW {
    using A = xsimd::default_arch;
    using V = detail::simd::Vec<T, A>;

public:
    double beta1 = .9, beta2 = .999, epsilon = 1e-8, weight_decay = 0;

    /// Throws invalid_input for a parameter out of range.
    void validate() const {
        detail::require(beta1 >= 0 && beta1 < 1, "beta1", "a share of [0, 1)", beta1);
        detail::require(beta2 >= 0 && beta2 < 1, "beta2", "a share of [0, 1)", beta2);
        detail::require(detail::is_finite(epsilon) && epsilon >= double(std::numeric_limits<T>::min()), "epsilon", "a number that the parameters' type has as a normal one > 0", epsilon);
        detail::require(detail::is_finite(weight_decay) && weight_decay >= 0, "weight_decay", "a factor >= 0", weight_decay);
    }

    /// Throws invalid_input unless the moments, if there are any, are those of this model's parameters.
    template <class Model>
    void check_model(Model& model) const {
        if (moments.empty()) return;
        std::size_t parameters = 0;
        model.for_each_parameter([&](const Parameter<T>& parameter) {
            const std::size_t size = parameter.value.values.size();
            detail::require(parameters < moments.size() && moments[parameters].mean.size() == size && moments[parameters].square.size() == size, "model", "the model of the earlier steps", parameter.name);
            ++parameters;
        });
        detail::require(parameters == moments.size(), "model", "the model of the earlier steps", parameters);
    }

    /// One step along the gradients, which it sets to 0. Throws invalid_input, before anything is changed, for a rate or parameter out of range, or another
    /// model than in earlier steps.
    template <class Model>
    void step(Model& model, double rate) {
        detail::require(detail::is_finite(rate) && rate >= 0, "rate", "a learning rate >= 0", rate);
        validate();
        check_model(model);
        ++steps;
        const double first = 1 / (1 - std::pow(beta1, double(steps))), second = 1 / (1 - std::pow(beta2, double(steps)));
        std::size_t number = 0;
        model.for_each_parameter([&](Parameter<T>& parameter) {
            if (number == moments.size()) moments.push_back({AlignedVector<T>(parameter.value.values.size()), AlignedVector<T>(parameter.value.values.size())});
            auto& own = moments[number++];
            AlignedVector<T>&mean = own.mean, &square = own.square;  // names that clang 14 lets lambdas capture
            const double decay = parameter.decays ? rate * weight_decay : 0;
            constexpr offset_t chunk = 4096;
            const auto size = static_cast<offset_t>(mean.size());
            parallel_for((size + chunk - 1) / chunk, [&](offset_t part, int) {
                for (offset_t i = part * chunk; i < std::min(size, (part + 1) * chunk); i += V::size) update(parameter, mean, square, static_cast<std::size_t>(i), rate, decay, first, second);
            });
        });
    }

    /// Steps done, and the running means of gradients and their squares, by parameter: what a resumed run needs.
    std::int64_t steps = 0;
    struct Moments {
        AlignedVector<T> mean, square;
    };
    std::vector<Moments> moments;

private:
    void update(Parameter<T>& parameter, AlignedVector<T>& mean, AlignedVector<T>& square, std::size_t at, double rate, double decay, double first, double second) const {
        alignas(64) T buffer[4][V::size] = {};
        const std::size_t count = std::min<std::size_t>(V::size, mean.size() - at);
        const bool whole = count == V::size;
        T* const memory[4] = {parameter.value.data() + at, parameter.gradient.data() + at, mean.data() + at, square.data() + at};
        if (!whole)
            for (int k = 0; k < 4; ++k) std::copy_n(memory[k], count, buffer[k]);
        const auto load = [&](int k) { return whole ? V::load_unaligned(memory[k]) : V::load_aligned(buffer[k]); };
        const V g = load(1);
        const V m = load(2) * V(static_cast<T>(beta1)) + g * V(static_cast<T>(1 - beta1));
        const V s = load(3) * V(static_cast<T>(beta2)) + g * g * V(static_cast<T>(1 - beta2));
        const V step_size = m * V(static_cast<T>(rate * first)) / (xsimd::sqrt(s * V(static_cast<T>(second))) + V(static_cast<T>(epsilon)));
        const V value = load(0) * V(static_cast<T>(1 - decay)) - step_size;
        const V results[4] = {value, V(T(0)), m, s};
        for (int k = 0; k < 4; ++k) {
            if (whole) results[k].store_unaligned(memory[k]);
            else {
                results[k].store_aligned(buffer[k]);
                std::copy_n(buffer[k], count, memory[k]);
            }
        }
    }
};

}  // namespace nn

POLYATTN_END_NAMESPACE
