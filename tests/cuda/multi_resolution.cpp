// AdaMRA's layer on the device against the CPU's in double: outputs, and gradients of x and of every parameter, within bounds that are computed beside them.
#include "cuda/device_multi_resolution.hpp"
#include "support/bounded.hpp"
#include "support/random.hpp"

#include <polyattn/nn/adaptive_multi_resolution.hpp>
#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

using namespace polyattn;
using namespace bounded;

namespace {

Bounded feature(const ReLU&, Bounded x) { return x.value < -x.error ? Bounded{} : Bounded{std::max(x.value, 0.), x.error}; }
Bounded slope(const ReLU&, Bounded x) { return {x.value > 0 ? 1. : 0., std::abs(x.value) <= x.error && x.error > 0 ? 1. : 0.}; }
Bounded feature(const EluPlusOne&, Bounded x) { return x.value > x.error ? x + Bounded{1, 0} : Bounded{x.value > 0 ? x.value + 1 : std::exp(x.value), exponential(x).error + x.error}; }
Bounded slope(const EluPlusOne&, Bounded x) { return x.value > x.error ? Bounded{1, 0} : Bounded{x.value > 0 ? 1 : std::exp(x.value), exponential(x).error + x.error}; }

template <class Score>
inline constexpr bool is_random = false;
template <class Divisor>
inline constexpr bool is_random<Kernel<PositiveRandomFeatures, Divisor>> = true;

/// d^(-1/4)
Bounded scale_of(index_t dim) { return {std::pow(double(dim), -.25), 4 * unit}; }
/// phi of sub-heads side by side. Shifts are the largest exponent of a row, or of a head's keys, off as far as exponents are.
Matrix random_features(const detail::RandomDirections& directions, const Matrix& x, index_t heads, bool of_keys) {
    const index_t width = directions.dim, count = directions.count;
    Matrix made(x.rows, heads * count);
    const double root = std::log(double(count)) / 2;
    for (index_t s = 0; s < heads; ++s) {
        std::vector<Bounded> shifts(static_cast<std::size_t>(x.rows), Bounded{-1e300, 0});
        for (index_t r = 0; r < x.rows; ++r) {
            Bounded& shift = shifts[of_keys ? 0 : static_cast<std::size_t>(r)];
            const auto y = [&](index_t c) { return x(r, s * width + c) * scale_of(width); };
            Sum square;
            for (index_t c = 0; c < width; ++c) square.add(y(c) * y(c));
            for (index_t f = 0; f < count; ++f) {
                Sum dot;
                for (index_t c = 0; c < width; ++c) dot.add(Bounded{directions.w[static_cast<std::size_t>(f * width + c)], 0} * y(c));
                const Bounded exponent = made(r, s * count + f) = dot.total() + -(square.total() * Bounded{.5, 0} + Bounded{root, 4 * unit * (1 + root)});
                shift = {std::max(shift.value, exponent.value), std::max(shift.error, exponent.error)};
            }
        }
        for (index_t r = 0; r < x.rows; ++r)
            for (index_t f = s * count; f < (s + 1) * count; ++f) made(r, f) = exponential(made(r, f) + -shifts[of_keys ? 0 : static_cast<std::size_t>(r)]);
    }
    return made;
}
/// With t = dL/dphi phi: dL/dx = d^(-1/4) sum_f t_f (w_f - y).
Matrix random_gradient(const detail::RandomDirections& directions, const Matrix& x, const Matrix& phi, const Matrix& d_phi) {
    const index_t width = directions.dim, count = directions.count;
    Matrix made(x.rows, x.columns);
    for (index_t r = 0; r < x.rows; ++r)
        for (index_t c = 0; c < x.columns; ++c) {
            const index_t first = c / width * count;
            Sum along, total;
            for (index_t f = 0; f < count; ++f) {
                const Bounded t = d_phi(r, first + f) * phi(r, first + f);
                along.add(t * Bounded{directions.w[static_cast<std::size_t>(f * width + c % width)], 0});
                total.add(t);
            }
            made(r, c) = (along.total() + -(total.total() * x(r, c) * scale_of(width))) * scale_of(width);
        }
    return made;
}

template <class Features, class Divisor>
Bounded slope_of(const Kernel<Features, Divisor>& score, Bounded x) { return slope(score.features, x); }
Bounded slope_of(const Softmax&, Bounded) { return {}; }

/// One item at one resolution; of softmax scores a range of columns is a sub-head.
struct Item {
    Matrix means, queries, phi_q, keys, phi_k, values, made;
};
/// What dropout multiplies with.
Bounded kept(double mask) { return {mask, mask == 1 ? 0 : unit * mask}; }

/// The layer by the formulas, on numbers that carry their errors. Rows of other items or padding are simply left out.
template <class Recipe>
struct Formulas;
template <index_t... L, class Router, class Score>
struct Formulas<MultiResolution<SegmentMeans<L...>, Router, Score>> {
    static constexpr index_t resolutions = sizeof...(L);
    static constexpr bool kernel = detail::is_kernel<Score>, learned = detail::is_learned_router<Router>, all = std::is_same_v<Router, ConcatenateAll>, gated = std::is_same_v<Router, TopOne<Switch>>;
    Matrix y, d_x;
    std::map<std::string, Matrix> gradients;
    bool routes_are_sure = true;

    Formulas(const MultiResolution<SegmentMeans<L...>, Router, Score>& recipe, const DevicePass<double>& pass, const std::vector<index_t>& routes) {
        const std::array<index_t, resolutions> lengths = {L...};
        const Matrix x(pass.x), d_y(pass.d_y);
        const index_t rows = x.rows, dim = x.columns, batch = pass.batch, tokens = rows / batch, width = dim / pass.heads;
        const auto parameter = [&](const std::string& name) { return Matrix(pass.parameters.at("layer." + name)); };
        const auto valid = [&](index_t b) { return pass.options.key_lengths.empty() ? tokens : pass.options.key_lengths[static_cast<std::size_t>(b)]; };
        const Matrix wq = parameter("query"), wk = parameter("key"), wv = parameter("value"), merge = parameter("merge.weight"), bias = parameter("merge.bias");
        std::vector<std::vector<index_t>> rows_at(static_cast<std::size_t>(resolutions * batch));
        index_t total = 0;
        for (index_t b = 0; b < batch; ++b)
            for (index_t i = 0; i < valid(b); ++i, ++total)
                for (index_t h = 0; h < resolutions; ++h)
                    if (all || routes[static_cast<std::size_t>(b * tokens + i)] == h) rows_at[static_cast<std::size_t>(h * batch + b)].push_back(b * tokens + i);
        const auto share = [&](index_t h) {
            double count = 0;
            for (index_t b = 0; b < batch; ++b) count += double(rows_at[static_cast<std::size_t>(h * batch + b)].size());
            return count / total;
        };

        Matrix folded_router, p(rows, resolutions), context(rows, (all ? resolutions : 1) * dim);
        if constexpr (learned) {
            folded_router = parameter("router") * wq;
            const Matrix logits = x * transposed(folded_router);
            for (index_t r = 0; r < rows; ++r) {
                const index_t route = routes[static_cast<std::size_t>(r)];
                if (route < 0) continue;
                Sum sum;
                for (index_t h = 0; h < resolutions; ++h) {
                    if (h != route && logits(r, route).value - logits(r, h).value <= logits(r, route).error + logits(r, h).error) routes_are_sure = false;
                    sum.add(p(r, h) = exponential(logits(r, h) + -logits(r, route)));
                }
                for (index_t h = 0; h < resolutions; ++h) p(r, h) = p(r, h) * inverse(sum.total());
            }
        }
        const auto mask_of = [&](index_t h, index_t b, index_t s) {
            Draw draw = pass.options.draw;
            draw.worker = draw.worker * static_cast<std::uint32_t>(resolutions * batch) + static_cast<std::uint32_t>(h * batch + b);
            return detail::DropoutMask(pass.options.dropout, draw, s);
        };
        const auto of_column = [](const detail::DropoutMask& mask, index_t row, index_t c) { return kept(mask.values_of_four(0, row, c / 4)[static_cast<std::size_t>(c % 4)]); };
        // What a row's column is multiplied with: the gate, and dropout.
        const auto factor = [&](index_t h, index_t b, index_t row, index_t place, index_t c) { return (gated ? p(row, h) : Bounded{1, 0}) * of_column(mask_of(h, b, c / width), place, c % width); };
        std::vector<Item> items(rows_at.size());
        std::vector<Matrix> folded_query, folded_key, folded_value;
        const double epsilon = std::is_same_v<Score, Kernel<ReLU>> ? AddEpsilon{}.epsilon : 0;
        const auto rows_of = [&](const Matrix& from, const std::vector<index_t>& which) {
            Matrix made(static_cast<index_t>(which.size()), from.columns);
            for (index_t r = 0; r < made.rows; ++r)
                for (index_t c = 0; c < made.columns; ++c) made(r, c) = from(which[static_cast<std::size_t>(r)], c);
            return made;
        };
        const index_t features = [&] {
            if constexpr (is_random<Score>) return recipe.score.features.count(width);
            else return width;
        }();  // of a sub-head
        const auto map = [&](const Matrix& from, [[maybe_unused]] bool of_keys) {
            if constexpr (is_random<Score>) return random_features(*recipe.score.features.bind(width), from, pass.heads, of_keys);
            else {
                Matrix made = from;
                if constexpr (kernel)
                    for (Bounded& entry : made.entries) entry = feature(recipe.score.features, entry);
                return made;
            }
        };
        const auto through_map = [&]([[maybe_unused]] const Matrix& from, [[maybe_unused]] const Matrix& phi, const Matrix& d_phi) {
            if constexpr (is_random<Score>) return random_gradient(*recipe.score.features.bind(width), from, phi, d_phi);
            else {
                Matrix made = d_phi;
                for (std::size_t i = 0; i < made.entries.size(); ++i) made.entries[i] = made.entries[i] * slope_of(recipe.score, from.entries[i]);
                return made;
            }
        };
        // Of one row and sub-head: 1 / denominator, and sum_j phi(k_j).
        const auto sum_of_keys = [&](const Item& item, index_t f) {
            Sum sum;
            for (index_t j = 0; j < item.phi_k.rows; ++j) sum.add(item.phi_k(j, f));
            return sum.total();
        };
        const auto inverse_of = [&](const Item& item, index_t r, index_t s) -> Bounded {
            Sum sum;
            for (index_t f = s * features; f < (s + 1) * features; ++f) sum.add(item.phi_q(r, f) * sum_of_keys(item, f));
            sum.add({epsilon, unit * epsilon});
            return sum.total().value == 0 ? Bounded{} : inverse(sum.total(), epsilon * (1 - 4 * unit));  // no term is negative
        };
        const auto state = [&](const Item& item, index_t f, index_t c) {
            Sum sum;
            for (index_t j = 0; j < item.phi_k.rows; ++j) sum.add(item.phi_k(j, f) * item.values(j, c));
            return sum.total();
        };
        for (index_t h = 0; h < resolutions; ++h) {
            const std::string own = detail::text("resolution", h, ".");
            folded_query.push_back(parameter(own + "query") * wq);
            folded_key.push_back(parameter(own + "key") * wk);
            folded_value.push_back(parameter(own + "value") * wv);
            for (index_t b = 0; b < batch; ++b) {
                Item& item = items[static_cast<std::size_t>(h * batch + b)];
                const auto& which = rows_at[static_cast<std::size_t>(h * batch + b)];
                const index_t length = lengths[static_cast<std::size_t>(h)], marks = detail::segments(valid(b), length);
                item.means = Matrix(marks, dim);
                for (index_t j = 0; j < marks; ++j)
                    for (index_t c = 0; c < dim; ++c) {
                        const index_t last = std::min((j + 1) * length, valid(b));
                        Sum sum;
                        for (index_t i = j * length; i < last; ++i) sum.add(inverse({double(last - j * length), 0}) * x(b * tokens + i, c));
                        item.means(j, c) = sum.total();
                    }
                const auto h_at = static_cast<std::size_t>(h);
                item.queries = rows_of(x, which) * transposed(folded_query[h_at]);
                item.keys = item.means * transposed(folded_key[h_at]);
                item.values = item.means * transposed(folded_value[h_at]);
                item.phi_q = map(item.queries, false);
                item.phi_k = map(item.keys, true);
                item.made = Matrix(item.queries.rows, dim);
                for (index_t s = 0; s < pass.heads; ++s) {
                    [[maybe_unused]] Matrix weights;
                    [[maybe_unused]] const detail::DropoutMask mask = mask_of(h, b, s);
                    if constexpr (!kernel) weights = softmax_weights(recipe.score.factor(width), item.queries, item.keys, {s * width, (s + 1) * width});
                    for (index_t c = s * width; c < (s + 1) * width; ++c) {
                        std::vector<Bounded> states;
                        for (index_t f = s * features; kernel && f < (s + 1) * features; ++f) states.push_back(state(item, f, c));
                        for (index_t r = 0; r < item.queries.rows; ++r) {
                            const index_t row = which[static_cast<std::size_t>(r)];
                            Sum sum;
                            if constexpr (kernel) {
                                const Bounded divisor = inverse_of(item, r, s);
                                for (index_t f = 0; f < features; ++f) sum.add(item.phi_q(r, s * features + f) * divisor * states[static_cast<std::size_t>(f)]);
                            } else
                                for (index_t j = 0; j < marks; ++j) sum.add(weights(r, j) * kept(mask.weight(r, j)) * item.values(j, c));
                            item.made(r, c) = sum.total();
                            context(row, (all ? h * dim : 0) + c) = factor(h, b, row, r, c) * item.made(r, c);
                        }
                    }
                }
            }
        }
        y = context * transposed(merge);
        Matrix d_merge = d_y;
        const detail::DropoutMask output({.values = pass.output_dropout}, pass.options.draw, static_cast<offset_t>(detail::DropSite::attention));
        for (index_t r = 0; r < rows; ++r)
            for (index_t c = 0; c < dim; ++c) {
                d_merge(r, c) = of_column(output, r, c) * d_y(r, c);
                y(r, c) = of_column(output, r, c) * (y(r, c) + bias(c, 0));
                if (!pass.residual.shape.empty()) y(r, c) = y(r, c) + Bounded{pass.residual.values[static_cast<std::size_t>(r * dim + c)], 0};
            }

        const Matrix d_context = d_merge * merge;
        d_x = Matrix(rows, dim);
        gradients["merge.weight"] = transposed(d_merge) * context;
        Matrix ones(rows, 1);
        for (Bounded& entry : ones.entries) entry.value = 1;
        gradients["merge.bias"] = transposed(d_merge) * ones;
        const auto unfold = [&](const Matrix& d_folded, const std::string& second, const std::string& first) {
            add(gradients[second], d_folded * transposed(parameter(first)));
            add(gradients[first], transposed(parameter(second)) * d_folded);
        };
        for (index_t h = 0; h < resolutions; ++h) {
            Matrix d_query(dim, dim), d_key(dim, dim), d_value(dim, dim);
            for (index_t b = 0; b < batch; ++b) {
                const Item& item = items[static_cast<std::size_t>(h * batch + b)];
                const auto& which = rows_at[static_cast<std::size_t>(h * batch + b)];
                const index_t queries = item.queries.rows, marks = item.keys.rows;
                Matrix d_q(queries, dim), d_k(marks, dim), d_v(marks, dim), d_out(queries, dim), g(queries, pass.heads), weighted(queries, pass.heads * features), d_phi_q = weighted, d_phi_k(marks, pass.heads * features);
                for (index_t r = 0; r < queries; ++r)
                    for (index_t c = 0; c < dim; ++c) {
                        const index_t row = which[static_cast<std::size_t>(r)];
                        d_out(r, c) = factor(h, b, row, r, c) * d_context(row, (all ? h * dim : 0) + c);
                    }
                if constexpr (!kernel)
                    for (index_t s = 0; s < pass.heads; ++s) {
                        const Bounds columns{s * width, (s + 1) * width};
                        const detail::DropoutMask mask = mask_of(h, b, s);
                        softmax_gradient(recipe.score.factor(width), item.queries, item.keys, columns, item.values, item.made, d_out, columns, d_q, d_k, d_v,
                                         [&](index_t r, index_t j) { return kept(mask.weight(r, j)); });
                    }
                for (index_t s = 0; kernel && s < pass.heads; ++s) {
                    const index_t first = s * width, last = first + width, first_f = s * features, last_f = first_f + features;
                    Matrix states(features, width);
                    for (index_t f = 0; f < features; ++f)
                        for (index_t c = 0; c < width; ++c) states(f, c) = state(item, first_f + f, first + c);
                    for (index_t r = 0; r < queries; ++r) {
                        const Bounded divisor = inverse_of(item, r, s);
                        std::vector<Bounded> d_a;
                        Sum along;
                        for (index_t f = first_f; f < last_f; ++f) {
                            weighted(r, f) = item.phi_q(r, f) * divisor;
                            Sum sum;
                            for (index_t c = first; c < last; ++c) sum.add(d_out(r, c) * states(f - first_f, c - first));
                            d_a.push_back(sum.total());
                            along.add(weighted(r, f) * d_a.back());
                        }
                        g(r, s) = -along.total();
                        for (index_t f = first_f; f < last_f; ++f) d_phi_q(r, f) = (d_a[static_cast<std::size_t>(f - first_f)] + g(r, s) * sum_of_keys(item, f)) * divisor;
                    }
                    Matrix turned(width, features);  // sum_i d_out_i a_i^T
                    std::vector<Bounded> by_g;
                    for (index_t f = first_f; f < last_f; ++f) {
                        for (index_t c = first; c < last; ++c) {
                            Sum sum;
                            for (index_t r = 0; r < queries; ++r) sum.add(d_out(r, c) * weighted(r, f));
                            turned(c - first, f - first_f) = sum.total();
                        }
                        Sum sum;
                        for (index_t r = 0; r < queries; ++r) sum.add(g(r, s) * weighted(r, f));
                        by_g.push_back(sum.total());
                    }
                    for (index_t j = 0; j < marks; ++j) {
                        for (index_t f = first_f; f < last_f; ++f) {
                            Sum sum;
                            for (index_t c = first; c < last; ++c) sum.add(item.values(j, c) * turned(c - first, f - first_f));
                            d_phi_k(j, f) = sum.total() + by_g[static_cast<std::size_t>(f - first_f)];
                        }
                        for (index_t c = first; c < last; ++c) {
                            Sum sum;
                            for (index_t f = first_f; f < last_f; ++f) sum.add(item.phi_k(j, f) * turned(c - first, f - first_f));
                            d_v(j, c) = sum.total();
                        }
                    }
                }
                if constexpr (kernel) {
                    d_q = through_map(item.queries, item.phi_q, d_phi_q);
                    d_k = through_map(item.keys, item.phi_k, d_phi_k);
                }
                const auto h_at = static_cast<std::size_t>(h);
                const Matrix d_rows = d_q * folded_query[h_at];
                for (index_t r = 0; r < queries; ++r)
                    for (index_t c = 0; c < dim; ++c) d_x(which[static_cast<std::size_t>(r)], c) = d_x(which[static_cast<std::size_t>(r)], c) + d_rows(r, c);
                Matrix d_means = d_k * folded_key[h_at];
                add(d_means, d_v * folded_value[h_at]);
                const index_t length = lengths[h_at];
                for (index_t i = 0; i < valid(b); ++i)
                    for (index_t c = 0; c < dim; ++c)
                        d_x(b * tokens + i, c) = d_x(b * tokens + i, c) + d_means(i / length, c) * inverse({double(std::min(length, valid(b) - i / length * length)), 0});
                add(d_query, transposed(d_q) * rows_of(x, which));
                add(d_key, transposed(d_k) * item.means);
                add(d_value, transposed(d_v) * item.means);
            }
            const std::string own = detail::text("resolution", h, ".");
            unfold(d_query, own + "query", "query");
            unfold(d_key, own + "key", "key");
            unfold(d_value, own + "value", "value");
        }
        if constexpr (learned) {
            Matrix d_logits(rows, resolutions), clean = x;
            for (index_t r = 0; r < rows; ++r) {
                const index_t route = routes[static_cast<std::size_t>(r)];
                if (route < 0) {
                    for (index_t c = 0; c < dim; ++c) clean(r, c) = {};
                    continue;
                }
                Sum sum;
                for (index_t c = 0; c < dim; ++c) sum.add(context(r, c) * d_context(r, c));
                Bounded through = sum.total();
                if (!gated) through = through * p(r, route);
                if (std::is_same_v<Router, TopOne<Literal>>) through = {};
                Sum mean;
                for (index_t h = 0; h < resolutions; ++h) mean.add(p(r, h) * Bounded{share(h), 0});
                for (index_t h = 0; h < resolutions; ++h) {
                    const Bounded of_balance = Bounded{recipe.router.balance * resolutions / total, unit} * p(r, h) * (Bounded{share(h), 0} + -mean.total());
                    d_logits(r, h) = through * (Bounded{h == route ? 1. : 0., 0} + -p(r, h)) + of_balance;
                }
            }
            add(d_x, d_logits * folded_router);
            unfold(transposed(d_logits) * clean, "router", "query");
        }
    }
};

/// A layer of the CPU in double and inputs for both; what the CPU's layer makes of them.
template <class Recipe, class T>
struct OnCpu {
    using Layer = nn::AdaptiveMultiResolution<double, Recipe>;
    Layer layer;
    DevicePass<T> pass;
    DevicePass<double> exact;
    typename Layer::Saved saved;
    Workspace workspace;
    Tensor<double> y, d_x;
    std::vector<index_t> routes;

    OnCpu(Random& random, const Recipe& recipe, index_t dim, index_t heads, index_t batch, index_t tokens, const std::vector<index_t>& lengths, const Dropout& dropout, double output_dropout)
        : layer("layer", recipe, dim, heads, heads, .3, 1, random.seed()), pass{{}, heads, batch, random.tensor<T>({batch * tokens, dim}), {}, random.tensor<T>({batch * tokens, dim}), {}} {
        if (random.below(2)) pass.residual = random.tensor<T>({batch * tokens, dim});
        pass.options.key_lengths = lengths;
        pass.options.draw = {.seed = random.seed(), .step = 2, .layer = 1, .worker = 3};
        pass.options.dropout = dropout;
        pass.output_dropout = output_dropout;
        exact = {{}, heads, batch, in_double(pass.x), in_double(pass.residual), in_double(pass.d_y), pass.options, output_dropout};
        layer.for_each_parameter([&](nn::Parameter<double>& parameter) {
            Tensor<T> rounded(parameter.value.shape);
            for (std::size_t i = 0; i < rounded.values.size(); ++i) rounded.values[i] = static_cast<T>(parameter.value.values[i] + (parameter.name == "layer.merge.bias" ? random.normal() : 0));
            parameter.value = in_double(rounded);
            pass.parameters.emplace(parameter.name, std::move(rounded));
            exact.parameters.emplace(parameter.name, parameter.value);
        });
        y = d_x = Tensor<double>(exact.x.shape);
        CallOptions options = pass.options;
        options.workspace = &workspace;
        const MatrixView<const double> residual = exact.residual.shape.empty() ? MatrixView<const double>{} : detail::rows_of(std::as_const(exact.residual));
        const detail::ActivationDropout output(output_dropout, {.draw = options.draw, .training = true}, detail::DropSite::attention);
        layer.forward(detail::rows_of(std::as_const(exact.x)), residual, detail::rows_of(y), batch, saved, options, output);
        routes.assign(layer.routes(saved).begin(), layer.routes(saved).end());
        layer.backward(detail::rows_of(std::as_const(exact.x)), detail::rows_of(std::as_const(exact.d_y)), detail::rows_of(d_x), batch, saved, workspace);
    }

    /// compare(device's numbers, the CPU's, name).
    template <class Compare>
    void compare_with(const DevicePassed<T>& got, Compare&& compare) {
        CHECK(got.routes == routes);
        CHECK(std::abs(got.balance_loss - layer.balance_loss(saved)) <= 100 * unit * (1 + layer.balance_loss(saved)));
        compare(got.y.values, y.values, "y");
        compare(got.d_x.values, d_x.values, "d_x");
        layer.for_each_parameter([&](nn::Parameter<double>& parameter) {
            REQUIRE(got.gradients.count(parameter.name) == 1);
            compare(got.gradients.at(parameter.name).values, parameter.gradient.values, parameter.name);
        });
    }
};

template <class Recipe, class T>
void check(Random& random, const Recipe& recipe, index_t dim, index_t heads, index_t batch, index_t tokens, const std::vector<index_t>& lengths, Tightness& of_all, const Dropout& dropout = {}, double output_dropout = 0) {
    INFO(batch, " items of ", tokens, " tokens, dim ", dim, ", heads ", heads);
    unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
    for (int attempt = 0; attempt < 20; ++attempt) {
        OnCpu<Recipe, T> cpu(random, recipe, dim, heads, batch, tokens, lengths, dropout, output_dropout);
        const Formulas<Recipe> formulas(recipe, cpu.exact, cpu.routes);
        if (!formulas.routes_are_sure) continue;  // two logits are too close to each other
        cpu.compare_with(run_on_device(recipe, cpu.pass), [&](const auto& device, const auto& wanted, const std::string& what) {
            const Matrix& bound = what == "y" ? formulas.y : what == "d_x" ? formulas.d_x : formulas.gradients.at(what.substr(6));
            REQUIRE(bound.entries.size() == wanted.size());
            check_within(device, wanted, [&](std::size_t i) { return bound.entries[i].error; }, what, of_all);
        });
        return;
    }
    FAIL("no inputs were found whose routes are sure");
}

template <class T, class Recipe>
void check_sizes(Random& random, const Recipe& recipe) {
    Tightness of_all;
    check<Recipe, T>(random, recipe, 6, 2, 1, 1, {}, of_all);
    check<Recipe, T>(random, recipe, 8, 2, 3, 7, {}, of_all);
    check<Recipe, T>(random, recipe, 6, 3, 3, 33, {33, 0, 1 + random.below(33)}, of_all);
    check<Recipe, T>(random, recipe, 12, 2, 3, 17, {17, 0, 1 + random.below(17)}, of_all, {.values = .25}, .3);
    check<Recipe, T>(random, recipe, 5, 1, 2, 64, {0, 0}, of_all);
    check<Recipe, T>(random, recipe, 16, 4, 2, 150, {150, random.below(151)}, of_all);
    check<Recipe, T>(random, recipe, 35, 5, 2, 20, {20, 3}, of_all);
    CHECK(of_all.tight >= of_all.entries / 4);
}

}  // namespace

TEST_CASE("straight-through gates") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, StraightThroughRecipe{});
    check_sizes<double>(random, StraightThroughRecipe{.router = {.balance = .7}});
    Tightness of_all;
    check<StraightThroughRecipe, float>(random, {.router = {.balance = .1}}, 70, 2, 2, 9, {}, of_all);
}
TEST_CASE("gates that multiply") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, SwitchRecipe{.router = {.balance = .7}});
    check_sizes<double>(random, SwitchRecipe{});
    check_sizes<double>(random, EluRecipe{});
}
TEST_CASE("gates without a gradient") {
    POLYATTN_RANDOM(random);
    check_sizes<double>(random, LiteralRecipe{});
    check_sizes<double>(random, LiteralRecipe{.router = {.balance = .3}});
}
TEST_CASE("softmax between the resolutions") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, SoftmaxRecipe{});
    check_sizes<double>(random, SoftmaxRecipe{.router = {.balance = .3}});
    Tightness of_all;
    check<SoftmaxRecipe, float>(random, {}, 12, 3, 3, 21, {21, 0, 1 + random.below(21)}, of_all, {.weights = .4});
    check<SoftmaxRecipe, double>(random, {}, 10, 2, 2, 90, {90, 1 + random.below(90)}, of_all, {.weights = .2, .values = .1}, .1);
}
TEST_CASE("random routes, and all of them") {
    POLYATTN_RANDOM(random);
    check_sizes<float>(random, RandomRecipe{.router = {.seed = random.seed()}});
    check_sizes<float>(random, AllRecipe{});
    check_sizes<double>(random, AllRecipe{});
}
TEST_CASE("random features") {
    POLYATTN_RANDOM(random);
    check_sizes<double>(random, RandomFeaturesRecipe{.score = {.features = {.features = 19, .seed = random.seed()}}});
}
