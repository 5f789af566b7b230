#pragma once
// The softmax operator of all heads of a call: which kernels run over which parts of a plan, in which order.

#include <polyattn/backend/cuda/half_tiles.cuh>
#include <polyattn/backend/cuda/rows.cuh>
#include <polyattn/backend/cuda/single_rows.cuh>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// One plan and the (batch, head) pairs that it is for.
template <int side>
struct PlannedItems {
    const DevicePlan<side>* plan;
    index_t first, last;
};

template <class T, class Bias>
class SoftmaxOperator {
    using Number = arithmetic_t<T>;
    using S = TileShape<T>;

public:
    static constexpr int side = S::side;
    using Runs = std::vector<PlannedItems<side>>;

    /// `logsumexp` [items][queries] belongs to the caller. The carver may only count.
    SoftmaxOperator(Carver& carver, const OperatorCall<T>& call, const Runs& runs, double scale, const Bias& bias, Number* logsumexp, bool backward)
        : call_(call), runs_(runs), op_{call.q, call.k, padded<T>(call.dim), static_cast<Number>(scale * 1.4426950408889634074), bias, call.dropout, call.query_lengths, call.key_lengths, call.queries, call.keys, 0, logsumexp},
          scale_(scale) {
        bool partials = backward;
        for (const auto& run : runs) {
            edges_ = std::max(edges_, run.plan->edge_count());
            partials |= run.plan->finished_by_edges(false);
        }
        const offset_t lines = offset_t{call.items()} * call.queries;
        weights_ = carver.template take<Number>(call.items() * edges_);
        if (backward) {
            d_scores_ = carver.template take<Number>(call.items() * edges_);
            partial_ = carver.template take<Number>(offset_t{call.items()} * std::max(call.queries, call.keys) * std::max(call.columns, op_.dim));
        } else {
            highest_ = carver.template take<Number>(partials ? lines : 0);
            sum_ = carver.template take<Number>(partials ? lines : 0);
            partial_ = carver.template take<Number>(partials ? lines * call.columns : 0);
        }
    }

    /// The mark of rows without keys, -infinity, among other numbers: [item][queries].
    const Number* marks() const { return op_.logsumexp; }
    void prepare() const {}
    /// finish(A values). The first call of a pass is told that A is new: it computes the logsumexp, and the weights of edges, which later calls use.
    void apply(bool is_new, const Rows<T>& values, const Finish<T>& finish) const {
        for (const auto& run : runs_) {
            const bool by_edges = run.plan->finished_by_edges(false);
            if (is_new && by_edges) score_edges_of(run, true);
            const bool tiles = begin_partial(run.plan->rows(), call_.queries, call_.columns, run);
            if (tiles) apply_tiles_of<false>(run, values, finish, is_new, by_edges);
            if (by_edges) apply_edges_of(run, false, weights_, true, values, call_.columns, tiles, is_new, op_.logsumexp, finish);
        }
    }

    static int take_gradient(Carver&) { return 0; }
    /// The weights of edges from the saved logsumexp.
    void prepare_backward() const {
        for (const auto& run : runs_)
            if (run.plan->edge_count() > 0) score_edges_of(run, false);
    }
    /// finish(A^T values).
    void apply_transposed(const Rows<T>& values, const Finish<T>& finish) const {
        for (const auto& run : runs_) {
            const bool by_edges = run.plan->finished_by_edges(true);
            const bool tiles = begin_partial(run.plan->columns(), call_.keys, call_.columns, run);
            if (tiles) apply_tiles_of<true>(run, values, finish, false, by_edges);
            if (by_edges) apply_edges_of(run, true, weights_, true, values, call_.columns, tiles, false, nullptr, finish);
        }
    }
    /// dL/dq and dL/dk, and what a learned bias collects.
    void gradient(const Hops<T>& hops, Finish<T> d_q, Finish<T> d_k, const BiasSums& bias_sums) const {
        for (const auto& run : runs_)
            if (run.plan->edge_count() > 0)
                for_each_grid(run.first, run.last, [&](index_t item, unsigned count) {
                    EdgeGradientArguments<T, Bias> arguments{op_, run.plan->edges(false), edges_, hops, weights_, d_scores_, bias_sums};
                    arguments.op.first_item = item;
                    launch("gradient_edges", gradient_edges<T, Bias>, dim3(blocks_for(call_.queries, edge_warps), count), edge_threads, 0, call_.stream, arguments);
                });
        d_q.factor = d_k.factor = static_cast<Number>(scale_);
        gradient_of<false>(hops, d_q, bias_sums);
        gradient_of<true>(hops, d_k, bias_sums);
    }

    /// Scratch of product_gradient().
    T* take_product_gradient(Carver& carver) const { return carver.template take<T>(offset_t{call_.items()} * call_.queries * (call_.columns + 1)); }
    /// The adjoint of one product, `made` = A values, from g = dL/dmade: d_values may be null.
    void product_gradient(T* scratch, const Rows<T>& g, const Rows<T>& made, const Rows<T>& values, const Finish<T>* d_values, const Finish<T>& d_q, const Finish<T>& d_k) const {
        const offset_t of_item = offset_t{call_.queries} * call_.columns;
        HopGradientArguments<T> arguments{};
        arguments.g = g;
        arguments.z = made;
        arguments.v = values;
        arguments.walk = 1;
        arguments.queries = call_.queries;
        arguments.columns = call_.columns;
        arguments.heads = call_.heads;
        arguments.query_lengths = call_.query_lengths;
        arguments.logsumexp = op_.logsumexp;
        arguments.h = scratch;
        arguments.h_stride = of_item;
        arguments.row_sums = scratch + call_.items() * of_item;
        arguments.first = true;
        apply_hop_gradient(arguments, call_.items(), call_.stream);
        if (d_values) apply_transposed(packed_rows<T>(arguments.h, call_.heads, of_item, call_.columns), *d_values);
        gradient(Hops<T>{1, arguments.h, nullptr, values, call_.queries, call_.columns, arguments.row_sums}, d_q, d_k, BiasSums{});
    }

private:
    static constexpr std::size_t tile_memory = 3 * S::buffer * sizeof(T);

    void score_edges_of(const PlannedItems<side>& run, bool online) const {
        ScoreArguments<T, Bias> arguments{op_, run.plan->edges(false), edges_, online, weights_, highest_, sum_};
        for_each_grid(run.first, run.last, [&](index_t item, unsigned items) {
            arguments.op.first_item = item;
            launch("score_edges", score_edges<T, Bias>, dim3(blocks_for(call_.queries, edge_warps), items), edge_threads, 0, call_.stream, arguments);
        });
    }
    void apply_edges_of(const PlannedItems<side>& run, bool transposed, Number* weights, bool masks, const Rows<T>& values, index_t columns, bool tiles, bool online, Number* logsumexp, const Finish<T>& finish) const {
        EdgeArguments<T> arguments{};
        arguments.edges = run.plan->edges(transposed);
        arguments.edge_count = edges_;
        arguments.weights = weights;
        arguments.masks = masks;
        arguments.transposed = transposed;
        arguments.dropout = call_.dropout;
        arguments.own_lengths = transposed ? call_.key_lengths : call_.query_lengths;
        arguments.other_lengths = transposed ? call_.query_lengths : call_.key_lengths;
        arguments.own = transposed ? call_.keys : call_.queries;
        arguments.heads = call_.heads;
        arguments.values = values;
        arguments.value_columns = columns;
        arguments.online = online;
        arguments.highest = highest_;
        arguments.sum = sum_;
        arguments.logsumexp = logsumexp;
        arguments.partial = tiles ? partial_ : nullptr;
        arguments.finish = finish;
        for_each_grid(run.first, run.last, [&](index_t item, unsigned items) {
            arguments.first_item = item;
            launch("apply_edges", apply_edges<T>, dim3(blocks_for(arguments.own, edge_warps), items), edge_threads, 0, call_.stream, arguments);
        });
    }
    template <bool Transposed>
    void apply_tiles_of(const PlannedItems<side>& run, const Rows<T>& values, const Finish<T>& finish, bool online, bool by_edges) const {
        const Direction& direction = Transposed ? run.plan->columns() : run.plan->rows();
        TileArguments<T, Bias> arguments{};
        arguments.op = op_;
        arguments.plan = run.plan->view(Transposed);
        arguments.values = values;
        arguments.value_columns = call_.columns;
        arguments.online = online;
        arguments.continues = !direction.complete;
        arguments.begins_state = online && by_edges;
        arguments.highest = highest_;
        arguments.sum = sum_;
        arguments.partial = by_edges ? partial_ : nullptr;
        arguments.finish = finish;
        const auto run_groups = [&](index_t begin, index_t end, index_t width, const char* name, auto kernel, int threads, std::size_t memory) {
            if (begin == end) return;
            const unsigned panels = std::max(1u, blocks_for(call_.columns, width));
            const bool one_by_one = by_edges && online && panels > 1;  // each panel needs the row's state as it was
            arguments.first_group = begin;
            for (unsigned panel = 0; panel < (one_by_one ? panels : 1); ++panel)
                for_each_grid(run.first, run.last, [&](index_t item, unsigned items) {
                    arguments.op.first_item = item;
                    arguments.first_panel = static_cast<index_t>(panel);
                    arguments.stores_state = !one_by_one || panel + 1 == panels;
                    launch(name, kernel, dim3(static_cast<unsigned>(end - begin), items, one_by_one ? 1 : panels), threads, memory, call_.stream, arguments);
                });
        };
        for (const Wave& wave : direction.waves) {
            if constexpr (is_narrow<T>) run_groups(wave.first, wave.first_single, S::width, "apply_tiles_half", apply_tiles_half<T, Bias>, tile_threads, tile_memory);
            else run_groups(wave.first, wave.first_single, S::width, Transposed ? "apply_tiles, transposed" : "apply_tiles", apply_tiles<T, Bias, Transposed>, tile_threads, tile_memory);
            run_groups(wave.first_single, wave.last, EdgeWalk<T>::width, Transposed ? "apply_single_rows, transposed" : "apply_single_rows", apply_single_rows<T, Bias, Transposed>, single_threads, 0);
        }
    }
    /// Rows that tiles add to wave by wave begin as 0. False if there are no tiles.
    bool begin_partial(const Direction& direction, index_t tokens, index_t columns, const PlannedItems<side>& run) const {
        if (direction.waves.empty()) return false;
        const offset_t item = offset_t{tokens} * columns;
        if (!direction.complete) check_cuda(cudaMemsetAsync(partial_ + run.first * item, 0, static_cast<std::size_t>((run.last - run.first) * item) * sizeof(Number), call_.stream), "cudaMemsetAsync");
        return true;
    }
    template <bool Transposed>
    void gradient_of(const Hops<T>& hops, const Finish<T>& finish, const BiasSums& bias_sums) const {
        const index_t tokens = Transposed ? call_.keys : call_.queries;
        if (tokens == 0) return;
        for (const auto& run : runs_) {
            const bool by_edges = run.plan->finished_by_edges(Transposed);
            const Direction& direction = Transposed ? run.plan->columns() : run.plan->rows();
            const bool tiles = begin_partial(direction, tokens, op_.dim, run);
            const bool keeps = op_.dim <= S::width && shared_memory_limit() >= static_cast<int>(4 * S::buffer * sizeof(T) + 1024);
            TileGradientArguments<T, Bias> arguments{op_, run.plan->view(Transposed), 0, hops, by_edges ? partial_ : nullptr, !direction.complete, keeps, finish, bias_sums};
            const auto run_groups = [&](index_t begin, index_t end, index_t width, const char* name, auto kernel, int threads, std::size_t memory) {
                if (begin == end) return;
                arguments.first_group = begin;
                for_each_grid(run.first, run.last, [&](index_t item, unsigned items) {
                    arguments.op.first_item = item;
                    launch(name, kernel, dim3(static_cast<unsigned>(end - begin), items, blocks_for(op_.dim, width)), threads, memory, call_.stream, arguments);
                });
            };
            for (const Wave& wave : direction.waves) {
                run_groups(wave.first, wave.first_single, S::width, Transposed ? "gradient_tiles, transposed" : "gradient_tiles", gradient_tiles<T, Bias, Transposed>, tile_threads, (keeps ? 4 : 3) * S::buffer * sizeof(T));
                run_groups(wave.first_single, wave.last, EdgeWalk<T>::width, Transposed ? "gradient_single_rows, transposed" : "gradient_single_rows", gradient_single_rows<T, Bias, Transposed>, single_threads, 0);
            }
            if (by_edges) apply_edges_of(run, Transposed, d_scores_, false, Transposed ? call_.q : call_.k, op_.dim, tiles, false, nullptr, finish);
        }
    }

    OperatorCall<T> call_;
    const Runs& runs_;
    Operator<T, Bias> op_;
    double scale_;
    offset_t edges_ = 0;
    Number *weights_ = nullptr, *d_scores_ = nullptr, *highest_ = nullptr, *sum_ = nullptr, *partial_ = nullptr;
};

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
