#pragma once

#include <polyattn/nn/linear.hpp>
#include <polyattn/nn/pass.hpp>
#include <polyattn/policy/router/multi_resolution.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

template <class T, class Attention>
class AdaptiveMultiResolution;

/// Adaptive multi-resolution attention: Q = x Wq, K = x Wk, V = x Wv; a router sends each query to one of H resolutions; there, S sub-heads with
/// projections of their own attend to the segment means of K and V; the rows, back in place, go through Wo. No biases (but Wo's).
/// Means and projections are linear maps, so tokens are averaged first, and the two projections of a path are multiplied first: only
/// landmarks are projected, and each query once. Queries are sorted by resolution (stable counting sort), so the work on them is dense. O(n d^2
/// (1 + sum_h 1 / L_h) + H d^3) a call: the last term, from the products of weights, counts where a batch has fewer than some 3 H d tokens. Parameters d^2 (4 + 3 H) + d H, and d of Wo's bias.
/// Deterministic for any number of threads. Source: AdaMRA (2021), equations 5 to 11.
template <class T, index_t... L, class Router, class Score>
class AdaptiveMultiResolution<T, MultiResolution<SegmentMeans<L...>, Router, Score>> {
    static constexpr std::array<index_t, sizeof...(L)> lengths = {L...};
    static constexpr index_t resolutions = sizeof...(L);
    static constexpr bool learned = detail::is_learned_router<Router>, all = std::same_as<Router, ConcatenateAll>;
    using Inner = polyattn::Attention<Score>;
    using Arch = xsimd::default_arch;

public:
    AdaptiveMultiResolution(const std::string& name, MultiResolution<SegmentMeans<L...>, Router, Score> recipe, index_t dim, index_t heads, index_t key_heads, double deviation, double scale, std::uint64_t seed)
        : query(name + ".query", {dim, dim}, true), key(name + ".key", {dim, dim}, true), value(name + ".value", {dim, dim}, true),
          merge(name + ".merge", (all ? resolutions : 1) * dim, dim, deviation * scale, seed), inner_(Inner(recipe.score)), recipe_(std::move(recipe)), dim_(dim), heads_(heads) {
        detail::require(heads >= 1 && dim % heads == 0, "heads", [&] { return detail::text("a number that divides dim, ", dim); }, heads);
        detail::require(key_heads == heads, "key_heads", [&] { return detail::text("as many as heads, ", heads); }, key_heads);
        if constexpr (learned) recipe_.router.validate();
        // Two maps follow each other: each keeps the size of what it gets.
        const double keeping = 1 / std::sqrt(double(dim));
        for (Parameter<T>* weight : {&query, &key, &value}) weight->draw(keeping, seed);
        for (index_t h = 0; h < resolutions; ++h)
            for (const char* what : {".query", ".key", ".value"}) {
                own.emplace_back(detail::text(name, ".resolution", h, what), std::vector<offset_t>{dim, dim}, true);
                own.back().draw(keeping, seed);
            }
        if constexpr (learned) {
            router.emplace_back(name + ".router", std::vector<offset_t>{resolutions, dim}, true);
            router[0].draw(keeping, seed);
        }
    }

    index_t heads() const { return heads_; }

    /// Moved, not copied.
    struct Saved : detail::MoveOnly {
        Tensor<T> probabilities, context, d_context, d_merge, d_logits;
        std::vector<index_t> routes;    // of each row; -1: padding
        std::vector<index_t> order;     // rows by (resolution, batch item, place)
        std::vector<index_t> starts;    // of each (resolution, batch item) in `order`, and the end
        std::vector<index_t> valid;     // tokens of each batch item
        double balance_loss = 0;
        struct Resolution {
            Tensor<T> folded_query, folded_keys;             // [dim, dim], [2 dim, dim]
            Tensor<T> means, landmarks, rows, queries, out;  // [batch landmarks, dim], [.., 2 dim], [queries here, dim] ..
            Tensor<T> d_means, d_landmarks, d_rows, d_queries, d_out, d_folded;
            std::vector<typename Inner::template SavedOf<T>> attention;
        };
        std::array<Resolution, static_cast<std::size_t>(resolutions)> resolution;
        Tensor<T> folded_router, d_folded_router;
        std::vector<Workspace> workspaces;
        detail::ActivationDropout dropout;
    };

    /// What the load-balance loss of the last forward pass adds to the loss; its gradient is in backward().
    static double balance_loss(const Saved& saved) { return saved.balance_loss; }
    /// Which resolution each row went to, [batch x tokens]; -1 for padding, 0 with ConcatenateAll.
    static std::span<const index_t> routes(const Saved& saved) { return saved.routes; }

    void forward(MatrixView<const T> x, MatrixView<const T> residual, MatrixView<T> y, index_t batch, Saved& saved, const CallOptions& options, const detail::ActivationDropout& dropout) const {
        Workspace& workspace = detail::workspace_of(options, x, batch);
        const index_t tokens = x.rows / batch;
        detail::check_lengths(options.key_lengths, batch, tokens, "key_lengths");
        detail::require(options.query_lengths.empty(), "query_lengths", "none: queries and keys are the same tokens", options.query_lengths.size());
        detail::require(!options.plan && options.item_plans.empty(), "plan", "none with several resolutions", "one");
        saved.dropout = dropout;
        saved.valid.assign(static_cast<std::size_t>(batch), tokens);
        if (!options.key_lengths.empty()) saved.valid = options.key_lengths;
        for (index_t h = 0; h < resolutions; ++h) fold(h, saved.resolution[static_cast<std::size_t>(h)], workspace);
        route(x, tokens, saved, options, workspace);
        sort_rows(tokens, saved);
        if constexpr (learned) saved.balance_loss = loss_of_balance(saved);
        detail::reshape(saved.context, {x.rows, merge.in()});
        for (index_t b = 0; b < batch; ++b) detail::fill_with_zeros(detail::row_range(detail::rows_of(saved.context), b * tokens + saved.valid[static_cast<std::size_t>(b)], (b + 1) * tokens));
        for (index_t h = 0; h < resolutions; ++h) project(h, x, saved, workspace);
        prepare_workspaces(saved);
        parallel_for(offset_t{resolutions} * batch, [&](offset_t unit, int worker) {
            const auto h = static_cast<index_t>(unit / batch), b = static_cast<index_t>(unit % batch);
            auto& at = saved.resolution[static_cast<std::size_t>(h)];
            const Views<T> views = views_of(saved, h, b, batch, tokens, at.queries, at.landmarks, at.out);
            CallOptions own_options{.draw = options.draw, .dropout = options.dropout, .workspace = &saved.workspaces[static_cast<std::size_t>(worker)]};
            own_options.draw.worker = options.draw.worker * static_cast<std::uint32_t>(resolutions * batch) + static_cast<std::uint32_t>(unit);  // masks of its own
            inner_.forward_into(views.q, at.attention[static_cast<std::size_t>(b)], constant(views.queries), constant(views.k), constant(views.v), own_options);
        });
        for (index_t h = 0; h < resolutions; ++h) scatter(h, saved);
        merge.forward(detail::rows_of(std::as_const(saved.context)), y, workspace, detail::add_residual(residual, dropout));
    }

    /// d_x of the branch alone.
    void backward(MatrixView<const T> x, MatrixView<const T> d_y, MatrixView<T> d_x, index_t batch, Saved& saved, Workspace& workspace) {
        const index_t tokens = x.rows / batch;
        const MatrixView<const T> d_merge = detail::dropped(d_y, saved.dropout, saved.d_merge);
        detail::reshape(saved.d_context, saved.context.shape);
        merge.backward(detail::rows_of(std::as_const(saved.context)), d_merge, detail::rows_of(saved.d_context), false, workspace);
        for (index_t i = 0; i < d_x.rows; ++i) std::fill_n(d_x.row(i), dim_, T(0));
        if constexpr (learned) {
            detail::reshape(saved.d_logits, {x.rows, resolutions});
            std::fill(saved.d_logits.values.begin(), saved.d_logits.values.end(), T(0));
        }
        for (index_t h = 0; h < resolutions; ++h) scatter_backward(h, saved);
        prepare_workspaces(saved);
        parallel_for(offset_t{resolutions} * batch, [&](offset_t unit, int worker) {
            const auto h = static_cast<index_t>(unit / batch), b = static_cast<index_t>(unit % batch);
            auto& at = saved.resolution[static_cast<std::size_t>(h)];
            const Views<T> views = views_of(saved, h, b, batch, tokens, at.d_queries, at.d_landmarks, at.d_out);
            Gradients<TensorView<T>> gradients{views.queries, views.k, views.v, {}, {}};
            inner_.backward_into(gradients, at.attention[static_cast<std::size_t>(b)], constant(views.q), {.workspace = &saved.workspaces[static_cast<std::size_t>(worker)]});
        });
        for (index_t h = 0; h < resolutions; ++h) project_backward(h, d_x, saved, workspace);
        if constexpr (learned) route_backward(x, d_x, saved, workspace);
    }

    template <class F>
    void for_each_parameter(F&& f) {
        for (Parameter<T>* weight : {&query, &key, &value}) f(*weight);
        for (Parameter<T>& weight : own) f(weight);
        for (Parameter<T>& weight : router) f(weight);
        merge.for_each_parameter(f);
    }

    /// Wq, Wk, Wv, rows are outputs.
    Parameter<T> query, key, value;
    /// For each resolution the maps of queries, keys and values, rows are outputs, those of sub-head s from s dim / S on.
    std::vector<Parameter<T>> own;
    /// [H, dim], if the router is learned.
    std::vector<Parameter<T>> router;
    Linear<T> merge;

private:
    template <class U>
    struct Views {
        TensorView<U> queries, k, v, q;  // q: where the output, or its gradient, lies
    };

    static void prepare_workspaces(Saved& saved) {
        saved.workspaces.resize(std::max(static_cast<std::size_t>(worker_count()), saved.workspaces.size()));
    }
    template <class F>
    static void for_each_item(index_t batch, F&& f) {
        parallel_for(batch, [&](offset_t b, int) { f(static_cast<index_t>(b)); });
    }
    static index_t batch_of(const Saved& saved) { return static_cast<index_t>(saved.valid.size()); }
    static TensorView<const T> constant(const TensorView<T>& view) { return view; }
    static index_t start(const Saved& saved, index_t h, index_t b) { return saved.starts[static_cast<std::size_t>(h) * saved.valid.size() + static_cast<std::size_t>(b)]; }

    /// The two maps of a path in one: rows of x to queries, means of x to keys and values.
    void fold(index_t h, typename Saved::Resolution& at, Workspace& workspace) const {
        detail::reshape(at.folded_query, {dim_, dim_});
        detail::reshape(at.folded_keys, {2 * dim_, dim_});
        const auto into = [&](std::size_t which, const Parameter<T>& first, MatrixView<T> to) {
            detail::multiply(detail::rows_of(own[static_cast<std::size_t>(3 * h) + which].value), detail::rows_of(first.value), to, false, workspace);
        };
        into(0, query, detail::rows_of(at.folded_query));
        into(1, key, detail::row_range(detail::rows_of(at.folded_keys), 0, dim_));
        into(2, value, detail::row_range(detail::rows_of(at.folded_keys), dim_, 2 * dim_));
    }
    /// Gradients of both factors of a folded map second * first.
    static void unfold(MatrixView<const T> d_folded, Parameter<T>& second, Parameter<T>& first, Workspace& workspace) {
        detail::multiply(d_folded, detail::transposed(detail::rows_of(std::as_const(first.value))), detail::rows_of(second.gradient), true, workspace);
        detail::multiply(detail::transposed(detail::rows_of(std::as_const(second.value))), d_folded, detail::rows_of(first.gradient), true, workspace);
    }

    /// Landmarks of all items, and the queries that go to resolution h.
    void project(index_t h, MatrixView<const T> x, Saved& saved, Workspace& workspace) const {
        auto& at = saved.resolution[static_cast<std::size_t>(h)];
        const index_t batch = batch_of(saved), tokens = x.rows / batch, length = lengths[static_cast<std::size_t>(h)], marks = detail::segments(tokens, length), first = start(saved, h, 0), count = start(saved, h + 1, 0) - first;
        detail::reshape(at.means, {offset_t{batch} * marks, dim_});
        detail::reshape(at.landmarks, {offset_t{batch} * marks, 2 * dim_});
        for (Tensor<T>* rows : {&at.rows, &at.queries, &at.out}) detail::reshape(*rows, {count, dim_});
        for_each_item(batch, [&](index_t b) {
            const index_t valid = saved.valid[static_cast<std::size_t>(b)], there = detail::segments(valid, length);
            const MatrixView<T> means = detail::row_range(detail::rows_of(at.means), b * marks, (b + 1) * marks);
            detail::simd::segment_means<Arch>(detail::row_range(x, b * tokens, b * tokens + valid), length, detail::row_range(means, 0, there));
            for (index_t j = there; j < marks; ++j) std::fill_n(means.row(j), dim_, T(0));
        });
        detail::multiply(detail::rows_of(std::as_const(at.means)), detail::transposed(detail::rows_of(std::as_const(at.folded_keys))), detail::rows_of(at.landmarks), false, workspace);
        gather(x, saved, first, detail::rows_of(at.rows));
        detail::multiply(detail::rows_of(std::as_const(at.rows)), detail::transposed(detail::rows_of(std::as_const(at.folded_query))), detail::rows_of(at.queries), false, workspace);
        at.attention.resize(static_cast<std::size_t>(batch));
    }
    /// d_x += what comes through landmarks and queries of resolution h, and the gradients of their maps.
    void project_backward(index_t h, MatrixView<T> d_x, Saved& saved, Workspace& workspace) {
        auto& at = saved.resolution[static_cast<std::size_t>(h)];
        const auto own_at = static_cast<std::size_t>(3 * h);
        const MatrixView<const T> d_queries = detail::rows_of(std::as_const(at.d_queries)), d_landmarks = detail::rows_of(std::as_const(at.d_landmarks));
        // Queries: rows of x, scattered back.
        detail::multiply(d_queries, detail::rows_of(std::as_const(at.folded_query)), detail::rows_of(at.d_rows), false, workspace);
        const index_t first = start(saved, h, 0);
        detail::parallel_rows(static_cast<index_t>(at.d_rows.shape[0]), [&](index_t r) {
            detail::simd::add_scaled<T, Arch>(T(1), detail::rows_of(at.d_rows).row(r), dim_, d_x.row(saved.order[static_cast<std::size_t>(first + r)]));
        });
        detail::reshape(at.d_folded, {2 * dim_, dim_});
        const MatrixView<T> d_folded = detail::row_range(detail::rows_of(at.d_folded), 0, dim_);
        detail::multiply(detail::transposed(d_queries), detail::rows_of(std::as_const(at.rows)), d_folded, false, workspace);
        unfold(d_folded, own[own_at], query, workspace);
        // Landmarks: means of x, spread back.
        detail::reshape(at.d_means, at.means.shape);
        detail::multiply(d_landmarks, detail::rows_of(std::as_const(at.folded_keys)), detail::rows_of(at.d_means), false, workspace);
        const index_t batch = batch_of(saved), tokens = d_x.rows / batch, length = lengths[static_cast<std::size_t>(h)], marks = detail::segments(tokens, length);
        for_each_item(batch, [&](index_t b) {
            detail::simd::spread_segments<Arch>(saved.valid[static_cast<std::size_t>(b)], length,
                                                MatrixView<const T>(detail::row_range(detail::rows_of(at.d_means), b * marks, (b + 1) * marks)),
                                                detail::row_range(d_x, b * tokens, (b + 1) * tokens));
        });
        detail::multiply(detail::transposed(d_landmarks), detail::rows_of(std::as_const(at.means)), detail::rows_of(at.d_folded), false, workspace);
        unfold(d_folded, own[own_at + 1], key, workspace);
        unfold(detail::row_range(detail::rows_of(at.d_folded), dim_, 2 * dim_), own[own_at + 2], value, workspace);
    }
    /// The outputs of resolution h to their rows of the context, times their gate.
    void scatter(index_t h, Saved& saved) const {
        auto& at = saved.resolution[static_cast<std::size_t>(h)];
        const index_t first = start(saved, h, 0);
        detail::parallel_rows(static_cast<index_t>(at.out.shape[0]), [&](index_t r) {
            const index_t row = saved.order[static_cast<std::size_t>(first + r)];
            fetch_ahead(saved, first + r, detail::rows_of(std::as_const(saved.context)));
            const T gate = std::same_as<Router, TopOne<Switch>> ? detail::rows_of(saved.probabilities)(row, h) : T(1);
            detail::simd::scale_row<T, Arch>(detail::rows_of(at.out).row(r), gate, dim_, detail::rows_of(saved.context).row(row) + (all ? h * dim_ : 0));
        });
    }
    void scatter_backward(index_t h, Saved& saved) const {
        auto& at = saved.resolution[static_cast<std::size_t>(h)];
        detail::reshape(at.d_landmarks, at.landmarks.shape);
        std::fill(at.d_landmarks.values.begin(), at.d_landmarks.values.end(), T(0));
        for (Tensor<T>* rows : {&at.d_out, &at.d_queries, &at.d_rows}) detail::reshape(*rows, at.out.shape);
        const index_t first = start(saved, h, 0);
        const MatrixView<const T> d_context = detail::rows_of(std::as_const(saved.d_context));
        const MatrixView<T> d_out = detail::rows_of(at.d_out), out = detail::rows_of(at.out);
        detail::parallel_rows(d_out.rows, [&](index_t r) {
            const index_t row = saved.order[static_cast<std::size_t>(first + r)];
            const T* const d = d_context.row(row) + (all ? h * dim_ : 0);
            T gate = 1;
            if constexpr (learned && !std::same_as<Router, TopOne<Literal>>) {
                const MatrixView<T> p = detail::rows_of(saved.probabilities);
                const T through = detail::simd::dot<T, Arch>(d, out.row(r), dim_) * p(row, h);
                for (index_t j = 0; j < resolutions; ++j) detail::rows_of(saved.d_logits)(row, j) += through * ((j == h ? T(1) : T(0)) - p(row, j));
                if constexpr (std::same_as<Router, TopOne<Switch>>) gate = p(row, h);
            }
            detail::simd::scale_row<T, Arch>(d, gate, dim_, d_out.row(r));
        });
    }

    /// Routes of all rows.
    void route(MatrixView<const T> x, index_t tokens, Saved& saved, const CallOptions& options, Workspace& workspace) const {
        const index_t batch = batch_of(saved);
        saved.routes.assign(static_cast<std::size_t>(x.rows), -1);
        if constexpr (learned) {
            detail::reshape(saved.folded_router, {resolutions, dim_});
            detail::multiply(detail::rows_of(router[0].value), detail::rows_of(query.value), detail::rows_of(saved.folded_router), false, workspace);
            detail::reshape(saved.probabilities, {x.rows, resolutions});
            detail::multiply(x, detail::transposed(detail::rows_of(std::as_const(saved.folded_router))), detail::rows_of(saved.probabilities), false, workspace);
        }
        for_each_item(batch, [&](index_t b) {
            const index_t valid = saved.valid[static_cast<std::size_t>(b)];
            for (index_t i = 0; i < valid; ++i) {
                const index_t row = b * tokens + i;
                index_t& chosen = saved.routes[static_cast<std::size_t>(row)];
                chosen = 0;
                if constexpr (learned) {
                    T* const p = detail::rows_of(saved.probabilities).row(row);
                    for (index_t h = 1; h < resolutions; ++h)
                        if (p[h] > p[chosen]) chosen = h;
                    const T highest = p[chosen];
                    for (index_t h = 0; h < resolutions; ++h) p[h] = (p[h] - highest) * static_cast<T>(detail::simd::log2_e);
                } else if constexpr (!all)
                    chosen = static_cast<index_t>(RandomRow(recipe_.router.seed, static_cast<std::uint32_t>(row), random_stream::random_routes, options.draw.hash()).below(resolutions));
            }
            if constexpr (learned) {
                T* const all_p = detail::rows_of(saved.probabilities).row(b * tokens);
                detail::simd::map_row<T, Arch>(all_p, all_p, valid * resolutions, [](auto t, auto) POLYATTN_INLINE_LAMBDA { return detail::simd::pow2<T, Arch>(t); });
                for (T* p = all_p; p != all_p + offset_t{valid} * resolutions; p += resolutions) {
                    const T factor = 1 / std::accumulate(p, p + resolutions, T(0));
                    for (index_t h = 0; h < resolutions; ++h) p[h] *= factor;
                }
            }
        });
    }
    /// The rows sorted by (resolution, item): a stable counting sort.
    void sort_rows(index_t tokens, Saved& saved) const {
        const index_t batch = batch_of(saved);
        saved.starts.assign(static_cast<std::size_t>(resolutions) * saved.valid.size() + 1, 0);
        const auto for_each = [&](auto&& f) {
            for (index_t b = 0; b < batch; ++b)
                for (index_t i = 0; i < saved.valid[static_cast<std::size_t>(b)]; ++i)
                    for (index_t h = 0; h < (all ? resolutions : 1); ++h) {
                        const index_t row = b * tokens + i;
                        f(static_cast<std::size_t>(all ? h : saved.routes[static_cast<std::size_t>(row)]) * saved.valid.size() + static_cast<std::size_t>(b), row);
                    }
        };
        for_each([&](std::size_t bucket, index_t) { ++saved.starts[bucket + 1]; });
        std::partial_sum(saved.starts.begin(), saved.starts.end(), saved.starts.begin());
        saved.order.resize(static_cast<std::size_t>(saved.starts.back()));
        std::vector<index_t> next(saved.starts.begin(), saved.starts.end() - 1);
        for_each([&](std::size_t bucket, index_t row) { saved.order[static_cast<std::size_t>(next[bucket]++)] = row; });
    }
    /// d_x += what comes through the router, and its gradients.
    void route_backward(MatrixView<const T> x, MatrixView<T> d_x, Saved& saved, Workspace& workspace) {
        balance(saved, x.rows);
        const MatrixView<const T> d_logits = detail::rows_of(std::as_const(saved.d_logits));
        detail::multiply(d_logits, detail::rows_of(std::as_const(saved.folded_router)), d_x, true, workspace);
        detail::reshape(saved.d_folded_router, {resolutions, dim_});
        // Item by item where there is padding, whose rows may hold anything.
        const index_t batch = batch_of(saved), tokens = x.rows / batch;
        const bool whole = std::all_of(saved.valid.begin(), saved.valid.end(), [&](index_t valid) { return valid == tokens; });
        for (index_t b = 0; b < (whole ? 1 : batch); ++b) {
            const index_t first = b * tokens, last = whole ? x.rows : first + saved.valid[static_cast<std::size_t>(b)];
            detail::multiply(detail::transposed(detail::row_range(d_logits, first, last)), detail::row_range(x, first, last), detail::rows_of(saved.d_folded_router), b > 0, workspace);
        }
        unfold(detail::rows_of(saved.d_folded_router), router[0], query, workspace);
    }
    /// Its weight times H times the sum over resolutions of the share of rows that one gets times its mean probability.
    double loss_of_balance(const Saved& saved) const {
        if (recipe_.router.balance <= 0 || saved.order.empty()) return 0;
        double loss = 0;
        for (index_t h = 0; h < resolutions; ++h) {
            double mean = 0;
            for (const index_t row : saved.order) mean += double(detail::rows_of(saved.probabilities)(row, h)) / double(saved.order.size());
            loss += recipe_.router.balance * resolutions * share(saved, h) * mean;
        }
        return loss;
    }
    static double share(const Saved& saved, index_t h) { return double(start(saved, h + 1, 0) - start(saved, h, 0)) / double(saved.order.size()); }
    /// The load-balance loss's part of d_logits.
    void balance(Saved& saved, index_t rows) const {
        if (recipe_.router.balance <= 0 || saved.order.empty()) return;
        for (index_t row = 0; row < rows; ++row) {
            if (saved.routes[static_cast<std::size_t>(row)] < 0) continue;
            const T* const p = detail::rows_of(saved.probabilities).row(row);
            double mean = 0;
            for (index_t h = 0; h < resolutions; ++h) mean += double(p[h]) * share(saved, h);
            for (index_t h = 0; h < resolutions; ++h)
                detail::rows_of(saved.d_logits)(row, h) += static_cast<T>(recipe_.router.balance * resolutions / double(saved.order.size()) * double(p[h]) * (share(saved, h) - mean));
        }
    }

    void gather(MatrixView<const T> x, const Saved& saved, index_t first, MatrixView<T> rows) const {
        detail::parallel_rows(rows.rows, [&](index_t r) {
            fetch_ahead(saved, first + r, x);
            std::copy_n(x.row(saved.order[static_cast<std::size_t>(first + r)]), dim_, rows.row(r));
        });
    }
    /// Rows in the order of a resolution are some rows apart, which no hardware foresees; with all resolutions they follow one another.
    static void fetch_ahead(const Saved& saved, index_t at, MatrixView<const T> rows) {
        const auto later = static_cast<std::size_t>(at) + 8;
        if (all || later >= saved.order.size()) return;
        const T* const row = rows.row(saved.order[later]);
        for (index_t c = 0; c < rows.cols; c += detail::simd::cache_line<T>) detail::simd::prefetch(row + c);
    }
    /// One batch item's queries and landmarks at one resolution, by sub-head.
    Views<T> views_of(const Saved& saved, index_t h, index_t b, index_t batch, index_t tokens, Tensor<T>& queries, Tensor<T>& landmarks, Tensor<T>& out) const {
        const index_t begin = start(saved, h, b) - start(saved, h, 0), end = (h * batch + b + 1 == resolutions * batch ? saved.starts.back() : start(saved, h, b + 1)) - start(saved, h, 0);
        const index_t length = lengths[static_cast<std::size_t>(h)], marks = detail::segments(tokens, length), there = detail::segments(saved.valid[static_cast<std::size_t>(b)], length), width = dim_ / heads_;
        const auto view = [&](T* data, index_t rows, std::ptrdiff_t stride) {
            return detail::make_view<T>(data, std::array<index_t, 4>{1, heads_, rows, width}, std::array<std::ptrdiff_t, 4>{0, width, stride, 1}, "rows");
        };
        T* const marks_data = landmarks.data() + offset_t{b} * marks * 2 * dim_;
        return {view(queries.data() + offset_t{begin} * dim_, end - begin, dim_), view(marks_data, there, 2 * dim_), view(marks_data + dim_, there, 2 * dim_), view(out.data() + offset_t{begin} * dim_, end - begin, dim_)};
    }

    Inner inner_;
    MultiResolution<SegmentMeans<L...>, Router, Score> recipe_;
    index_t dim_, heads_;
};

}  // namespace nn

POLYATTN_END_NAMESPACE
