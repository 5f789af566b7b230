// Nystrom attention on the device against the CPU's in double: outputs and all gradients, within bounds that are computed beside them.
#include "cuda/device_nystrom.hpp"
#include "support/bounded.hpp"
#include "support/random.hpp"

#include <polyattn/nystrom_attention.hpp>
#include <polyattn/polyattn.hpp>

#include <doctest/doctest.h>

using namespace polyattn;
using namespace bounded;

namespace {

Matrix scaled(Bounded factor, Matrix a) {
    for (Bounded& entry : a.entries) entry = factor * entry;
    return a;
}
Matrix plus(Matrix a, const Matrix& b) {
    add(a, b);
    return a;
}
/// a + factor I.
Matrix plus_identity(Matrix a, double factor) {
    for (index_t i = 0; i < a.rows; ++i) a(i, i) = a(i, i) + Bounded{factor, 0};
    return a;
}
Matrix means(const Matrix& x, index_t length) {
    Matrix made(detail::segments(x.rows, length), x.columns);
    for (index_t j = 0; j < made.rows; ++j)
        for (index_t c = 0; c < x.columns; ++c) {
            Sum sum;
            const index_t last = std::min((j + 1) * length, x.rows);
            for (index_t i = j * length; i < last; ++i) sum.add(inverse({double(last - j * length), 0}) * x(i, c));
            made(j, c) = sum.total();
        }
    return made;
}
void spread(const Matrix& d_means, index_t length, Matrix& d_x) {
    for (index_t i = 0; i < d_x.rows; ++i)
        for (index_t c = 0; c < d_x.columns; ++c)
            d_x(i, c) = d_x(i, c) + d_means(i / length, c) * inverse({double(std::min(length, d_x.rows - i / length * length)), 0});
}

/// One head by the formulas, on numbers that carry their errors.
struct Head {
    Matrix out, d_q, d_k, d_v, d_table;
    bool column_is_sure = true;

    Head(const Nystrom& parameters, const Matrix& q, const Matrix& k, const Matrix& v, const Matrix& d_out, const double* table) : d_q(q.rows, q.columns), d_k(k.rows, k.columns), d_v(v.rows, v.columns), d_table(parameters.width, 1) {
        const index_t n = q.rows, length = parameters.segment_length(n);
        const double scale = 1 / std::sqrt(double(q.columns));
        const Bounds all{0, q.columns}, values_all{0, v.columns};
        const Matrix query_marks = means(q, length), key_marks = means(k, length);
        const index_t m = query_marks.rows;
        const Matrix a = softmax_weights(scale, query_marks, key_marks, all), reading = softmax_weights(scale, query_marks, k, all), writing = softmax_weights(scale, q, key_marks, all);
        const Matrix summary = reading * v;

        // Z_0 = A^T / (largest row sum x largest column sum); rows sum to 1.
        std::vector<Bounded> sums;
        for (index_t j = 0; j < m; ++j) {
            Sum sum;
            for (index_t i = 0; i < m; ++i) sum.add(a(i, j));
            sums.push_back(sum.total());
        }
        const auto largest = std::max_element(sums.begin(), sums.end(), [](Bounded x, Bounded y) { return x.value < y.value; });
        const auto column = static_cast<index_t>(largest - sums.begin());
        for (index_t j = 0; j < m; ++j)
            if (j != column && largest->value - sums[static_cast<std::size_t>(j)].value <= largest->error + sums[static_cast<std::size_t>(j)].error) column_is_sure = false;
        const Bounded row_sum{1, (4 * m + 16) * unit}, column_sum = *largest, first = inverse(row_sum * column_sum);
        std::vector<Matrix> z{scaled(first, transposed(a))};
        const auto x_of = [&](index_t t) { return a * z[static_cast<std::size_t>(t)]; };
        const auto u_of = [&](const Matrix& x) { return plus_identity(plus(x * x, scaled({-7, 0}, x)), 15); };
        const auto w_of = [&](const Matrix& x, const Matrix& u) { return plus_identity(x * u, -13); };
        for (index_t t = 0; t < parameters.iterations; ++t) {
            const Matrix x = x_of(t);
            z.push_back(scaled({-.25, 0}, z.back() * w_of(x, u_of(x))));
        }
        const Matrix values = z.back() * summary, written = writing * values;
        out = written;
        for_each_tap(parameters.width, n, [&](index_t t, index_t i, index_t from) {
            for (index_t c = 0; c < v.columns; ++c) out(i, c) = out(i, c) + Bounded{table[t], unit * std::abs(table[t])} * v(from, c);
        });

        Matrix d_query_marks(m, q.columns), d_key_marks(m, q.columns), d_values(m, v.columns);
        softmax_gradient(scale, q, key_marks, all, values, written, d_out, values_all, d_q, d_key_marks, d_values);
        const Matrix d_summary = transposed(z.back()) * d_values;
        Matrix d_z = d_values * transposed(summary), d_a(m, m);
        softmax_gradient(scale, query_marks, k, all, v, summary, d_summary, values_all, d_query_marks, d_k, d_v);
        for (index_t t = parameters.iterations; t-- > 0;) {
            const Matrix x = x_of(t), u = u_of(x), w = w_of(x, u), own = z[static_cast<std::size_t>(t)];
            const Matrix d_w = scaled({-.25, 0}, transposed(own) * d_z), d_u = transposed(x) * d_w;
            const Matrix d_x = plus(plus(plus(d_w * transposed(u), scaled({-7, 0}, d_u)), d_u * transposed(x)), transposed(x) * d_u);
            add(d_a, d_x * transposed(own));
            d_z = plus(scaled({-.25, 0}, d_z * transposed(w)), transposed(a) * d_x);
        }
        Sum along;
        for (index_t i = 0; i < m; ++i)
            for (index_t j = 0; j < m; ++j) {
                along.add(d_z(i, j) * first * a(j, i));
                d_a(j, i) = d_a(j, i) + d_z(i, j) * first;
            }
        // What the largest row sum gets is the same for a whole row, so the softmax's gradient has nothing of it but roundings, of whichever row is the largest.
        const Bounded of_row = along.total() * inverse(row_sum), of_column = along.total() * inverse(column_sum);
        for (index_t i = 0; i < m; ++i)
            for (index_t j = 0; j < m; ++j) {
                d_a(i, j).error += (4 * m + 16) * unit * of_row.size();
                if (j == column) d_a(i, j) = d_a(i, j) + -of_column;
            }
        Matrix identity(m, m), of_queries(m, q.columns), of_keys(m, q.columns), unused(m, m);
        softmax_gradient(scale, query_marks, key_marks, all, plus_identity(identity, 1), a, d_a, {0, m}, of_queries, of_keys, unused);
        add(d_query_marks, of_queries);
        add(d_key_marks, of_keys);
        spread(d_query_marks, length, d_q);
        spread(d_key_marks, length, d_k);
        for_each_tap(parameters.width, n, [&](index_t t, index_t i, index_t from) {
            for (index_t c = 0; c < v.columns; ++c) {
                d_v(from, c) = d_v(from, c) + Bounded{table[t], unit * std::abs(table[t])} * d_out(i, c);
                d_table(t, 0).value += d_out(i, c).value * v(from, c).value;
                d_table(t, 0).error += 2 * double(n) * double(v.columns) * 0x1p-53 * std::abs(d_out(i, c).value * v(from, c).value);  // sums are in double
            }
        });
    }

    /// f(weight, token, token that it reads).
    template <class F>
    static void for_each_tap(index_t width, index_t n, F&& f) {
        for (index_t t = 0; t < width; ++t)
            for (index_t i = 0; i < n; ++i)
                if (const index_t from = i + t - width / 2; from >= 0 && from < n) f(t, i, from);
    }
};

template <class T>
NystromCall<T> draw_call(Random& random, const Nystrom& parameters, index_t batch, index_t heads, index_t key_heads, index_t n, index_t d, index_t e, const std::vector<index_t>& lengths) {
    NystromCall<T> call{parameters, random.tensor<T>({batch, heads, n, d}), random.tensor<T>({batch, key_heads, n, d}), random.tensor<T>({batch, key_heads, n, e}), random.tensor<T>({batch, heads, n, e}), {}};
    call.parameters.table.resize(static_cast<std::size_t>(parameters.width * heads));
    for (double& weight : call.parameters.table) weight = random.normal();
    call.options.key_lengths = lengths;
    return call;
}
template <class T>
NystromCall<double> exact_call(const NystromCall<T>& call) {
    return {call.parameters, in_double(call.q), in_double(call.k), in_double(call.v), in_double(call.d_out), call.options};
}
template <class T>
NystromResult<T> run_on_cpu(const NystromCall<T>& call) {
    const NystromAttention layer(call.parameters);
    const auto forward = layer.forward(call.q.view(), call.k.view(), call.v.view(), call.options);
    auto gradient = layer.backward(forward.saved, call.d_out.view());
    return {forward.out, std::move(gradient.q), std::move(gradient.k), std::move(gradient.v), std::move(gradient.compression)};
}
/// compare(device's numbers, the CPU's, name) of everything that a call makes.
template <class T, class Compare>
void for_each_result(const NystromResult<T>& device, const NystromResult<double>& cpu, Compare&& compare) {
    compare(device.out.values, cpu.out.values, "out");
    compare(device.d_q.values, cpu.d_q.values, "d_q");
    compare(device.d_k.values, cpu.d_k.values, "d_k");
    compare(device.d_v.values, cpu.d_v.values, "d_v");
    compare(device.d_table, cpu.d_table, "table");
}

/// How far off each number may be; of gradients of heads that share keys the sum.
struct Allowed {
    std::map<std::string, AlignedVector<double>> errors;
    bool sure = true;

    explicit Allowed(const NystromCall<double>& call) {
        const auto q = call.q.view(), k = call.k.view(), v = call.v.view(), d_out = call.d_out.view();
        const index_t heads = q.heads(), group = heads / k.heads(), width = call.parameters.width;
        Tensor<double> out(call.d_out.shape), d_q(call.q.shape), d_k(call.k.shape), d_v(call.v.shape);
        AlignedVector<double> d_table(call.parameters.table.size(), 0.);
        for (index_t b = 0; b < q.batch(); ++b)
            for (index_t h = 0; h < heads; ++h) {
                const index_t valid = call.options.key_lengths.empty() ? q.tokens() : call.options.key_lengths[static_cast<std::size_t>(b)];
                if (valid == 0) continue;
                const auto take = [&](MatrixView<const double> from) {
                    Matrix made(valid, from.cols);
                    for (index_t i = 0; i < valid; ++i)
                        for (index_t c = 0; c < from.cols; ++c) made(i, c).value = from(i, c);
                    return made;
                };
                const Head head(call.parameters, take(q.head(b, h)), take(k.head(b, h / group)), take(v.head(b, h / group)), take(d_out.head(b, h)), call.parameters.table.data() + h * width);
                sure = sure && head.column_is_sure;
                const auto put = [&](const Matrix& from, MatrixView<double> to) {
                    for (index_t i = 0; i < valid; ++i)
                        for (index_t c = 0; c < to.cols; ++c) to(i, c) += from(i, c).error + (group > 1 ? group * unit * from(i, c).size() : 0);
                };
                put(head.out, out.view().head(b, h));
                put(head.d_q, d_q.view().head(b, h));
                put(head.d_k, d_k.view().head(b, h / group));
                put(head.d_v, d_v.view().head(b, h / group));
                for (index_t t = 0; t < width; ++t) d_table[static_cast<std::size_t>(h * width + t)] += head.d_table(t, 0).error + 0x1p-53 * q.batch() * head.d_table(t, 0).size();
            }
        errors = {{"out", out.values}, {"d_q", d_q.values}, {"d_k", d_k.values}, {"d_v", d_v.values}, {"table", d_table}};
    }
};

/// Entry by entry within bounds that hold. They grow some thirtyfold a step of the iteration, so it has few steps here.
template <class T>
void check(Random& random, const Nystrom& parameters, index_t batch, index_t heads, index_t key_heads, index_t n, index_t d, index_t e, const std::vector<index_t>& lengths, Tightness& of_all) {
    INFO(batch, " items of ", heads, " / ", key_heads, " heads, ", n, " tokens, d ", d, ", e ", e, ", ", parameters.landmarks, " landmarks, ", parameters.iterations, " steps");
    unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
    for (int attempt = 0; attempt < 20; ++attempt) {
        const auto call = draw_call<T>(random, parameters, batch, heads, key_heads, n, d, e, lengths);
        const auto exact = exact_call(call);
        const Allowed bounds(exact);
        if (!bounds.sure) continue;  // two columns' sums are too close to each other
        for_each_result(run_on_device(call), run_on_cpu(exact), [&](const auto& device, const auto& wanted, const std::string& what) {
            const auto& errors = bounds.errors.at(what);
            REQUIRE(errors.size() == wanted.size());
            check_within(device, wanted, [&](std::size_t i) { return errors[i]; }, what, of_all);
        });
        return;
    }
    FAIL("no inputs were found whose largest column is sure");
}

}  // namespace

TEST_CASE_TEMPLATE("outputs and gradients within bounds", T, float, double) {
    POLYATTN_RANDOM(random);
    Tightness of_all;
    const auto run = [&](index_t landmarks, index_t n, index_t width, index_t heads, index_t key_heads, const std::vector<index_t>& lengths) {
        const index_t steps = random.below(sizeof(T) == 4 ? 3 : 5);
        check<T>(random, {.landmarks = landmarks, .iterations = steps, .width = width}, lengths.empty() ? 2 : static_cast<index_t>(lengths.size()), heads, key_heads, n, 1 + random.below(12), 1 + random.below(12), lengths, of_all);
    };
    run(64, 1, 0, 1, 1, {});
    run(1, 7, 3, 2, 2, {});
    run(4, 11, 0, 2, 1, {});
    run(4, 30, 5, 4, 2, {30, 0, 1, 7});
    run(7, 33, 1, 2, 2, {33, 12});
    run(9, 5, 7, 2, 1, {5, 3});
    run(33, 64, 3, 1, 1, {64, 45});
    run(65, 70, 0, 1, 1, {});
    run(70, 70, 3, 2, 1, {70, 66});
    check<T>(random, {.landmarks = 5, .iterations = 2, .width = 3}, 1, 2, 1, 40, 35, 70, {}, of_all);
    check<T>(random, {.landmarks = 5, .iterations = 1}, 2, 2, 2, 0, 3, 4, {}, of_all);
    check<T>(random, {.landmarks = 5, .iterations = 1, .width = 3}, 2, 2, 1, 6, 3, 0, {}, of_all);
    check<T>(random, {.landmarks = 5, .iterations = 1, .width = 3}, 3, 2, 1, 6, 3, 2, {0, 0, 0}, of_all);
    CHECK(of_all.tight >= of_all.entries / 4);
}

TEST_CASE_TEMPLATE("with the paper's steps, as near as the conditioning lets it be", T, float, double) {
    POLYATTN_RANDOM(random);
    unit = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;
    for (const auto& [landmarks, n] : {std::pair{4, 37}, {64, 130}, {33, 33}}) {
        INFO(landmarks, " landmarks of ", n, " tokens");
        const auto call = draw_call<T>(random, {.landmarks = landmarks, .width = 3}, 2, 2, 1, n, 8, 5, {n, n - n / 3});
        const auto exact = exact_call(call);
        const auto wanted = run_on_cpu(exact);
        // An estimate: what inputs that are off by a factor within 1 +- step make of the results, the largest of a few draws, is the conditioning; roundings are
        // taken for changes of the inputs by some hundred units.
        const double step = 0x1p-30;
        std::map<std::string, double> conditions;
        for (int repeat = 0; repeat < 4; ++repeat) {
            auto moved = exact;
            for (Tensor<double>* tensor : {&moved.q, &moved.k, &moved.v, &moved.d_out})
                for (double& entry : tensor->values) entry *= 1 + step * (2 * random.uniform() - 1);
            for_each_result(run_on_cpu(moved), wanted, [&](const auto& got, const auto& before, const std::string& what) {
                for (std::size_t i = 0; i < before.size(); ++i) conditions[what] = std::max(conditions[what], std::abs(got[i] - before[i]) / step);
            });
        }
        for_each_result(run_on_device(call), wanted, [&](const auto& device, const auto& cpu, const std::string& what) {
            double worst = 0;
            for (std::size_t i = 0; i < cpu.size(); ++i) worst = std::max(worst, std::abs(double(device[i]) - cpu[i]));
            INFO(what);
            CHECK(worst <= 300 * unit * conditions[what]);
        });
    }
}
