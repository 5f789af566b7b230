#pragma once
// AdaMRA's layer on the device, forward and backward: nn::AdaptiveMultiResolution with its parameters in device memory.

#include <polyattn/backend/cuda/attention_layer.cuh>
#include <polyattn/backend/cuda/compress.cuh>
#include <polyattn/backend/cuda/multi_resolution_weights.cuh>
#include <polyattn/backend/cuda/router_gradient.cuh>
#include <polyattn/policy/router/multi_resolution.hpp>

POLYATTN_BEGIN_NAMESPACE

namespace nn {

/// nn::AdaptiveMultiResolution on the device, with gradients of x and of all parameters, from its parameters by name (what for_each_parameter()
/// of the CPU's layer or nn::parameters_of() of a model gives). Rows go where the CPU's layer sends them, as far as logits that are made in another
/// order agree. Float or double. Belongs to one stream at a time.
/// Weights of two maps that follow each other are multiplied once, when they come; queries are gathered by resolution and projected there,
/// landmarks are means of tokens, projected. O(n d^2 (1 + sum_h 1 / L_h)) a pass, and O(H d^3) of upload() and of backward().
/// Memory of a pass: a dozen rows of d columns for each place of one resolution, which has as many places an item as the fullest has rows (softmax: up to an
/// eighth of the tokens more), and for sums of weights' gradients a few such weights and 17 MB (double: 8 MB) at most.
/// Deterministic, without atomics on floating point. Source: AdaMRA (2021), equations 5 to 11.
template <class T, index_t... L, class Router, class Score>
class CudaAdaptiveMultiResolution<T, MultiResolution<SegmentMeans<L...>, Router, Score>> {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>, "polyattn: CudaAdaptiveMultiResolution takes float or double");
    static constexpr std::array<index_t, sizeof...(L)> lengths = {L...};
    static constexpr index_t resolutions = sizeof...(L);
    static constexpr bool learned = detail::is_learned_router<Router>, all = std::is_same_v<Router, ConcatenateAll>, gated = std::is_same_v<Router, TopOne<Switch>>, kernel = detail::is_kernel<Score>;
    using Inner = AttentionLayer<Dense, AllSources, NoDiffusion, Score, NoBias, Cuda>;
    using Carver = detail::cuda::Carver;
    using Weights = detail::cuda::MultiResolutionWeights<T>;
    using Parameters = typename Weights::Parameters;

public:
    using Recipe = MultiResolution<SegmentMeans<L...>, Router, Score>;

    /// `name` is that of the CPU's layer, in front of the parameters' own; `heads` its sub-heads. Throws invalid_input if a parameter is missing or has
    /// another shape, cuda_error.
    CudaAdaptiveMultiResolution(Recipe recipe, const Parameters& parameters, const std::string& name, index_t heads)
        : inner_(std::tuple(recipe.score)), recipe_(std::move(recipe)), weights_(parameters, name, resolutions, learned, blocks()), dim_(weights_.dim()), width_(weights_.width()), heads_(heads) {
        if constexpr (learned) recipe_.router.validate();
        detail::require(heads >= 1 && dim_ % heads == 0, "heads", [&] { return detail::text("a number that divides dim, ", dim_); }, heads);
        upload(parameters);
        zero_gradients();
        detail::cuda::check_cuda(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    }

    index_t dim() const { return dim_; }
    index_t heads() const { return heads_; }

    /// Other values of the same parameters. Throws invalid_input.
    void upload(const Parameters& parameters, cudaStream_t stream = nullptr) { weights_.upload(parameters, stream); }

    /// What backward needs of a forward pass. Borrows x, which must stay as it is until the last backward(). Handed to one forward pass after the other, it
    /// allocates nothing once it has met the largest.
    class Saved {
    public:
        /// What the load-balance loss adds to the loss; its gradient is in backward().
        double balance_loss() const { return balance_loss_; }
        /// Which resolution each row went to, [batch x tokens]; -1 for padding, 0 with ConcatenateAll. Waits for the stream.
        std::vector<index_t> routes(cudaStream_t stream = nullptr) const {
            std::vector<index_t> made(static_cast<std::size_t>(kept_.routes.rows.rows()));
            if (made.empty()) return made;
            detail::cuda::check_cuda(cudaMemcpyAsync(made.data(), kept_.routes.of_rows, made.size() * sizeof(index_t), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of routes");
            detail::cuda::check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
            return made;
        }

    private:
        friend class CudaAdaptiveMultiResolution;
        struct Kept {
            detail::cuda::Routes routes{};
            index_t* lengths = nullptr;  // of tokens, then of the landmarks of each resolution; null: all
            T* probabilities = nullptr;  // [rows][resolutions]
            T* context = nullptr;        // [rows][columns]: what the last map gets
            T* logsumexp = nullptr;      // of softmax, [batch x heads][places] of each resolution, with room for [tokens]
            std::uint32_t* draws = nullptr;  // hashes of dropout's draws, [resolutions x batch]; null: none are dropped
        };
        TensorView<const T> x_;
        detail::DropoutMask dropout_, output_dropout_;
        std::map<std::array<index_t, 2>, Plan> plans_;  // of softmax, by resolution and places: what the device has of them stays
        Kept kept_;
        CudaWorkspace memory_;
        std::vector<index_t> starts_;
        double balance_loss_ = 0;
    };

    /// y = what the CPU's layer makes of x, plus `residual` unless it has no memory.
    /// Shapes: x, residual and y [batch x tokens, dim] in device memory, rows of contiguous columns (but x's); y may be the residual, not x. Of `options` key_lengths,
    /// draw and dropout (of what attention makes, and of softmax's weights), the stream and the workspace are used. `output_dropout` is the probability with which
    /// entries of what the layer adds to the residual are dropped, as in a TransformerBlock under the same draw. All masks are the CPU's. Rows behind a length count nowhere,
    /// whatever they hold; their y is the bias, and the residual. Waits for the stream once: the host has to know how many rows went where. Throws
    /// invalid_input, cuda_error.
    void forward(const TensorView<const T>& x, const TensorView<const T>& residual, const TensorView<T>& y, index_t batch, Saved& saved, const CudaOptions& options = {}, double output_dropout = 0) const {
        check(x, batch, options);
        detail::require(detail::is_finite(output_dropout) && output_dropout >= 0 && output_dropout < 1, "output_dropout", "a probability of [0, 1)", output_dropout);
        check_rows(y, x.tokens(), "y");
        if (residual.data) check_rows(residual, x.tokens(), "residual");
        saved.balance_loss_ = 0;
        std::vector<index_t> valid;  // as Kept::lengths has them
        if (!options.key_lengths.empty()) {
            valid = options.key_lengths;
            for (const index_t length : lengths)
                for (const index_t tokens : options.key_lengths) valid.push_back(detail::segments(tokens, length));
        }
        Carver counter;
        prepare(saved, counter, x, batch, options);
        saved.memory_.reserve(counter.used());
        Carver kept(saved.memory_.data());
        prepare(saved, kept, x, batch, options);
        saved.output_dropout_ = detail::DropoutMask({.values = output_dropout}, options.draw, static_cast<offset_t>(detail::DropSite::attention));
        const auto put = [&]<class U>(const std::vector<U>& from, U* to, const char* what) {
            if (!from.empty()) detail::cuda::check_cuda(cudaMemcpyAsync(to, from.data(), from.size() * sizeof(U), cudaMemcpyHostToDevice, options.stream), what);
        };
        put(valid, saved.kept_.lengths, "cudaMemcpyAsync of lengths");
        std::vector<std::uint32_t> draws;
        if (saved.kept_.draws)
            for (index_t unit = 0; unit < resolutions * batch; ++unit) {
                Draw own = options.draw;
                own.worker = own.worker * static_cast<std::uint32_t>(resolutions * batch) + static_cast<std::uint32_t>(unit);
                draws.push_back(own.hash());
            }
        put(draws, saved.kept_.draws, "cudaMemcpyAsync of draws");
        detail::cuda::with_workspace(options, [&](Carver carver) { return work(carver, residual, y, saved, options); });
    }

    /// d_x from d_y = dL/dy, of the branch alone, not of the residual; adds to the gradients of the parameters. `saved` must come from forward() of this layer
    /// with the same parameters; of `options` the stream and the workspace are used. Queries and landmarks are made anew. Repeatable; deterministic; does not wait.
    /// Throws as forward().
    void backward(const Saved& saved, const TensorView<const T>& d_y, const TensorView<T>& d_x, const CudaOptions& options = {}) {
        detail::require(saved.x_.dim() == dim_ && !saved.starts_.empty(), "saved", "a forward pass of this layer", "none");
        check_shape(d_y, saved.x_.tokens(), "d_y");
        check_rows(d_x, saved.x_.tokens(), "d_x");
        detail::cuda::with_workspace(options, [&](Carver carver) { return work_backward(carver, saved, d_y, d_x, options.stream); });
    }

    /// Gradients of all parameters, by name and in their shapes, brought to the host: waits for the stream.
    Parameters gradients(cudaStream_t stream = nullptr) const { return weights_.gradients(stream); }
    void zero_gradients(cudaStream_t stream = nullptr) { weights_.zero_gradients(stream); }

    /// Bytes of workspace that the same call of forward() takes, wherever the rows go. Throws invalid_input.
    std::size_t workspace_bytes(const TensorView<const T>& x, index_t batch, const CudaOptions& options = {}) const {
        check(x, batch, options);
        Saved saved;
        Carver counter;
        prepare(saved, counter, x, batch, options);
        return work({}, {}, {}, saved, options);
    }
    /// Bytes of workspace that backward() takes.
    std::size_t backward_workspace_bytes(const Saved& saved) const {
        // Rows that have to be copied.
        const TensorView<const T> d_y{nullptr, {1, 1, saved.x_.tokens(), dim_}, {0, 0, dim_, 2}, 2};
        return work_backward({}, saved, d_y, {}, nullptr);
    }

private:
    /// Of one resolution, in workspace memory.
    struct Path {
        index_t marks, places;                // of a batch item
        T *means, *landmarks, *rows, *queries;  // [batch x marks][width], [batch x marks][2 width], [batch x places][width] ..
    };

    static constexpr index_t blocks() { return all ? resolutions : 1; }

    template <class U>
    void check_shape(const TensorView<U>& view, index_t rows, const char* argument) const {
        const TensorView<U> wanted{nullptr, {1, 1, rows, dim_}, {}, 2};
        if (view.extents != wanted.extents || view.rank != 2) throw invalid_input(argument, detail::shape_text(wanted), detail::shape_text(view));
        detail::cuda::require_device_memory(view, argument);
    }
    /// The same, of tensors that are read and written by rows.
    template <class U>
    void check_rows(const TensorView<U>& view, index_t rows, const char* argument) const {
        check_shape(view, rows, argument);
        detail::require(dim_ == 1 || view.strides[3] == 1, argument, "rows of contiguous columns", [&] { return detail::text("a stride of ", view.strides[3]); }());
    }
    /// Of rows in the caller's memory, in bytes.
    std::size_t row_bytes() const { return static_cast<std::size_t>(dim_) * sizeof(T); }
    template <class U>
    std::size_t pitch(const TensorView<U>& view) const { return std::max(static_cast<std::size_t>(view.strides[2]) * sizeof(T), row_bytes()); }

    void check(const TensorView<const T>& x, index_t batch, const CudaOptions& options) const {
        check_shape(x, x.tokens(), "x");
        detail::require(batch >= 1 && batch <= 65535 && x.tokens() % batch == 0, "batch", [&] { return detail::text("a number from 1 to 65535 that divides the ", x.tokens(), " rows of x"); }, batch);
        detail::require(offset_t{x.tokens()} * blocks() <= std::numeric_limits<index_t>::max(), "x", "rows x resolutions below 2^31", x.tokens());
        detail::check_lengths(options.key_lengths, batch, x.tokens() / batch, "key_lengths");
        detail::require(options.query_lengths.empty(), "query_lengths", "none: queries and keys are the same tokens", options.query_lengths.size());
        detail::require(!options.plan && options.item_plans.empty(), "plan", "none with several resolutions", "one");
        options.dropout.validate();
        detail::require(!kernel || options.dropout.weights == 0, "dropout.weights", "0 with kernel scores, whose weights are never formed", options.dropout.weights);
        detail::require(!options.accumulate, "accumulate", "false: what is added is the residual", "true");
    }

    /// What a pass keeps, without its contents. The carver may only count.
    void prepare(Saved& saved, Carver& carver, const TensorView<const T>& x, index_t batch, const CudaOptions& options) const {
        const index_t rows = x.tokens(), tokens = rows / batch;
        saved.x_ = x;
        saved.dropout_ = detail::DropoutMask(options.dropout, options.draw, 0);
        saved.starts_.clear();
        typename Saved::Kept& made = saved.kept_;
        if (made.routes.rows.tokens != tokens) saved.plans_.clear();
        made = {};
        if (!options.key_lengths.empty()) made.lengths = carver.template take<index_t>(offset_t{batch} * (resolutions + 1));
        const detail::cuda::RoutedRows routed{batch, tokens, resolutions, {made.lengths, tokens}};
        made.routes = detail::cuda::Routes::take(carver, routed, all);
        if (learned) made.probabilities = carver.template take<T>(offset_t{rows} * resolutions);
        made.context = carver.template take<T>(offset_t{rows} * blocks() * width_);
        if (saved.dropout_.drops_weights() || saved.dropout_.drops_values()) made.draws = carver.template take<std::uint32_t>(offset_t{batch} * resolutions);
        if (!kernel) made.logsumexp = carver.template take<T>(offset_t{rows} * heads_ * resolutions);
    }

    /// Places of an item for the rows of the fullest. Each number of places has a plan of softmax, which is made and copied to the device once: eight at most.
    static index_t places_for(index_t rows, index_t tokens) {
        constexpr index_t side = detail::cuda::TileShape<T>::side;
        if (kernel) return rows;
        const index_t step = (tokens + 8 * side - 1) / (8 * side) * side;
        return std::min(tokens, (rows + step - 1) / step * step);
    }
    /// f(resolution, places). A carver that counts gets the most places that there might be: fewer never take more memory.
    template <class F>
    static void for_each_resolution(const Carver& carver, const Saved& saved, F&& f) {
        const detail::cuda::RoutedRows& rows = saved.kept_.routes.rows;
        for (index_t h = 0; h < resolutions; ++h) {
            index_t most = 0;
            if (carver.counts()) most = rows.tokens;
            else
                for (index_t b = 0; b < rows.batch; ++b) {
                    const auto bucket = static_cast<std::size_t>(h * rows.batch + b);
                    most = std::max(most, saved.starts_[bucket + 1] - saved.starts_[bucket]);
                }
            if (most > 0) f(h, places_for(most, rows.tokens));
        }
    }

    /// x as one row after the other, and by batch items.
    static detail::cuda::Rows<T> rows_of(const Saved& saved, Carver& carver, cudaStream_t stream) {
        detail::cuda::Rows<T> x = detail::cuda::as_rows(saved.x_, 1, carver, stream);
        x.batch_stride = saved.kept_.routes.rows.tokens * x.row_stride;
        return x;
    }
    static detail::cuda::Lengths landmark_lengths(const Saved& saved, index_t h, index_t marks) {
        const index_t* const lengths_of = saved.kept_.lengths;
        return {lengths_of ? lengths_of + (h + 1) * saved.kept_.routes.rows.batch : nullptr, marks};
    }
    detail::cuda::CompressionCall compression(const Saved& saved, index_t marks, cudaStream_t stream) const {
        const detail::cuda::RoutedRows& rows = saved.kept_.routes.rows;
        return {rows.batch, 1, rows.tokens, marks, width_, rows.lengths, stream};
    }
    /// Each item has a draw of its own at each resolution, as on the CPU.
    static detail::cuda::CallDropout dropout(const Saved& saved, index_t h) { return {saved.dropout_, saved.kept_.draws ? saved.kept_.draws + h * saved.kept_.routes.rows.batch : nullptr}; }
    /// Rows of x, or of what attention makes of them, with gates and dropout.
    detail::cuda::BucketRows<T> bucket(const Saved& saved, index_t h, index_t places, T* rows, T* all_rows, std::ptrdiff_t stride, bool made) const {
        const detail::cuda::Routes& routes = saved.kept_.routes;
        detail::cuda::RowFactors<T> factors;
        if (made) {
            if (gated) factors.gates = saved.kept_.probabilities;
            factors.dropout = dropout(saved, h);
            factors.head_columns = dim_ / heads_;
        }
        return {routes.rows, routes.order, routes.starts, h, places, width_, rows, all_rows, width_, stride, factors, false};
    }

    /// Means, landmarks and queries of one resolution. Equations 7 and 8.
    Path make_path(Carver& carver, const Saved& saved, const detail::cuda::Rows<T>& x, index_t h, index_t places, cudaStream_t stream) const {
        const detail::cuda::RoutedRows& rows = saved.kept_.routes.rows;
        const index_t length = lengths[static_cast<std::size_t>(h)], marks = detail::segments(rows.tokens, length);
        const offset_t of_marks = offset_t{rows.batch} * marks * width_, of_places = offset_t{rows.batch} * places * width_;
        const Path path{marks, places, carver.template take<T>(of_marks), carver.template take<T>(2 * of_marks), carver.template take<T>(of_places), carver.template take<T>(of_places)};
        if (carver.counts()) return path;
        const typename Weights::Folded folded = weights_.folded(h);
        const detail::cuda::CompressionCall call = compression(saved, marks, stream);
        detail::cuda::compress_with<false>(detail::cuda::MeanForm<T>{length}, detail::cuda::CompressArguments<T>{x, {}, call, 0, detail::cuda::packed_finish(path.means, marks, width_, 1)});
        detail::cuda::apply_linear<T>(path.means, width_, folded.keys, width_, rows.batch * marks, 2 * width_, path.landmarks, 2 * width_, stream);
        detail::cuda::move_rows("gather_rows", detail::cuda::gather_rows<T>, bucket(saved, h, places, path.rows, const_cast<T*>(x.data), x.row_stride, false), stream);
        detail::cuda::apply_linear<T>(path.rows, width_, folded.query, width_, rows.batch * places, width_, path.queries, width_, stream);
        return path;
    }
    /// Rows of a resolution by sub-head.
    template <class U>
    TensorView<U> by_heads(U* data, index_t tokens, std::ptrdiff_t stride, index_t batch) const {
        const index_t columns = dim_ / heads_;
        return detail::make_view<U>(data, std::array<index_t, 4>{batch, heads_, tokens, columns}, std::array<std::ptrdiff_t, 4>{tokens * stride, columns, stride, 1}, "rows");
    }
    /// f(operator, call, values): attention of the queries to the landmarks. Equation 9.
    template <class F>
    void with_operator(Carver& carver, const Saved& saved, const Path& path, index_t h, bool backward, cudaStream_t stream, F&& f) const {
        using namespace detail::cuda;
        const Routes& routes = saved.kept_.routes;
        const index_t batch = routes.rows.batch;
        const auto q = by_heads(static_cast<const T*>(path.queries), path.places, width_, batch);
        const auto k = by_heads(static_cast<const T*>(path.landmarks), path.marks, 2 * width_, batch), v = by_heads(static_cast<const T*>(path.landmarks) + width_, path.marks, 2 * width_, batch);
        const OperatorCall<T> call{as_rows(q, heads_, carver, stream), as_rows(k, heads_, carver, stream), batch, heads_, heads_, path.places, path.marks, q.dim(), padded<T>(q.dim()),
                                   {routes.counts + h * batch, path.places}, landmark_lengths(saved, h, path.marks), dropout(saved, h), stream};
        const Rows<T> values = as_rows(v, heads_, carver, stream);
        const auto run = [&](const auto& runs, T* logsumexp) { inner_.template with_operator<T>(carver, call, q, k, runs, logsumexp, backward, [&](const auto& op) { f(op, call, values); }); };
        if constexpr (kernel) run(nullptr, nullptr);
        else {
            typename Inner::Plans plans;
            plans.shared = saved.plans_.at({h, path.places});
            run(Inner::template planned_items<T>(q, plans), carver.counts() ? nullptr : saved.kept_.logsumexp + offset_t{h} * routes.rows.rows() * heads_);
        }
    }

    /// Dropout of what the layer makes, or of its gradient, to `to` or onto it.
    static void drop(const detail::cuda::Rows<T>& from, const Saved& saved, const TensorView<T>& to, bool adds, cudaStream_t stream) {
        detail::cuda::Finish<T> finish;
        finish.dropout.mask = saved.output_dropout_;
        finish.accumulate = adds;
        detail::cuda::finish_heads(from, 1, to, {nullptr, to.tokens()}, finish, stream);
    }

    /// Routes, and the numbers of rows that the host has to know.
    void route(Carver& carver, const detail::cuda::Rows<T>& x, Saved& saved, const CudaOptions& options) const {
        using namespace detail::cuda;
        const cudaStream_t stream = options.stream;
        const Routes& routes = saved.kept_.routes;
        Routing routing(carver, routes, stream);
        double* const sums = carver.template take<double>(learned ? resolutions : 0);
        if (carver.counts()) return;
        double balance = 0;
        if constexpr (learned) {
            T* const probabilities = saved.kept_.probabilities;
            apply_linear<T>(x.data, x.row_stride, weights_.folded_router(), width_, routes.rows.rows(), resolutions, probabilities, resolutions, stream);
            routing.template choose<T>(probabilities, probabilities);
            balance = recipe_.router.balance;
        } else if constexpr (all) routing.send_to_all();
        else routing.draw(recipe_.router.seed, options.draw);
        routing.sort();
        saved.starts_.resize(static_cast<std::size_t>(routes.rows.buckets()) + 1);
        check_cuda(cudaMemcpyAsync(saved.starts_.data(), routes.starts, saved.starts_.size() * sizeof(index_t), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of starts");
        double mean[static_cast<std::size_t>(resolutions)] = {};
        if (balance > 0) {
            launch("sum_probabilities", sum_probabilities<T>, dim3(static_cast<unsigned>(resolutions)), probability_threads, 0, stream, static_cast<const T*>(saved.kept_.probabilities), routes.rows.rows(), index_t{resolutions}, sums);
            check_cuda(cudaMemcpyAsync(mean, sums, sizeof mean, cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of probabilities");
        }
        check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        const double total = saved.starts_.back();
        if (balance > 0 && total > 0)
            for (index_t h = 0; h < resolutions; ++h) {
                const auto first = static_cast<std::size_t>(h * routes.rows.batch), last = first + static_cast<std::size_t>(routes.rows.batch);
                saved.balance_loss_ += balance * resolutions * (saved.starts_[last] - saved.starts_[first]) / total * (mean[static_cast<std::size_t>(h)] / total);
            }
    }

    /// The forward pass, or, with a carver that counts, only the bytes that it takes. Resolutions come one after the other, in the same memory.
    std::size_t work(Carver carver, const TensorView<const T>& residual, const TensorView<T>& y, Saved& saved, const CudaOptions& options) const {
        using namespace detail::cuda;
        const cudaStream_t stream = options.stream;
        const Rows<T> x = rows_of(saved, carver, stream);
        const index_t rows = saved.x_.tokens(), batch = saved.kept_.routes.rows.batch, columns = blocks() * width_;
        T* const context = saved.kept_.context;
        Carver own = carver;
        route(own, x, saved, options);
        std::size_t most = own.used();
        if (!carver.counts()) fill_zeros(context, offset_t{rows} * columns, stream);
        for_each_resolution(carver, saved, [&](index_t h, index_t places) {
            Carver scratch = carver;
            const Path path = make_path(scratch, saved, x, h, places, stream);
            if constexpr (!kernel)
                if (!saved.plans_.count({h, places})) saved.plans_.emplace(std::array{h, places}, inner_.plan(places, path.marks));
            const offset_t numbers = offset_t{batch} * places * width_;
            T* const out = scratch.template take<T>(numbers);
            with_operator(scratch, saved, path, h, false, stream, [&](const auto& op, const OperatorCall<T>&, const Rows<T>& values) {
                most = std::max(most, scratch.used());
                if (scratch.counts()) return;
                fill_zeros(out, numbers, stream);  // columns that pad rows
                op.prepare();
                Finish<T> finish;
                set_target(finish, by_heads(out, places, width_, batch));
                op.apply(true, values, finish);
                move_rows("scatter_rows", scatter_rows<T>, bucket(saved, h, places, out, context + (all ? h * width_ : 0), columns, true), stream);
            });
        });
        // With dropout behind the last map, its rows; less than a resolution takes.
        Carver last = carver;
        T* const branch = last.template take<T>(offset_t{rows} * width_);
        most = std::max(most, last.used());
        if (carver.counts()) return most;
        // Equation 11.
        const bool drops = saved.output_dropout_.drops_values();
        LinearArguments<T> merge{};
        merge.x = context;
        merge.weight = weights_.merge();
        merge.bias = weights_.merge_bias();
        merge.residual = drops ? nullptr : residual.data;
        merge.residual_stride = residual.strides[2];
        merge.y = drops ? branch : y.data;
        merge.rows = rows;
        merge.in = columns;
        merge.out = drops ? width_ : dim_;
        merge.x_stride = columns;
        merge.y_stride = drops ? width_ : y.strides[2];
        apply_linear(merge, stream);
        if (!drops) return most;
        if (residual.data && residual.data != y.data && rows > 0)
            check_cuda(cudaMemcpy2DAsync(y.data, pitch(y), residual.data, pitch(residual), row_bytes(), static_cast<std::size_t>(rows), cudaMemcpyDeviceToDevice, stream), "cudaMemcpy2DAsync of residual");
        drop(packed_rows<T>(branch, 1, 0, width_), saved, y, residual.data != nullptr, stream);
        return most;
    }

    /// The backward pass, or only the bytes that it takes.
    std::size_t work_backward(Carver carver, const Saved& saved, const TensorView<const T>& d_y, const TensorView<T>& d_x, cudaStream_t stream) const {
        using namespace detail::cuda;
        constexpr index_t vector = 16 / sizeof(T);
        const Routes& routes = saved.kept_.routes;
        const index_t rows = saved.x_.tokens(), batch = routes.rows.batch, tokens = routes.rows.tokens, columns = blocks() * width_;
        const T* const context = saved.kept_.context;
        const Rows<T> x = rows_of(saved, carver, stream), all_d = as_rows(d_y, 1, carver, stream);
        const bool drops = saved.output_dropout_.drops_values();
        T* const dropped = carver.template take<T>(drops ? offset_t{rows} * width_ : 0);
        const Rows<T> d = drops ? packed_rows<T>(dropped, 1, 0, width_) : all_d;
        T* const d_context = carver.template take<T>(offset_t{rows} * columns);
        std::size_t most = carver.used();
        const bool works = !carver.counts() && rows > 0;
        {
            TokenSum<T> of_weight = TokenSum<T>::of_rows(nullptr, width_, context, columns, rows), of_bias = TokenSum<T>::of_rows(nullptr, width_, nullptr, vector, rows);
            of_weight.values = of_bias.values = d;
            Carver scratch = carver;
            T* const ones = scratch.template take<T>(vector);
            T* const states = scratch.template take<T>(std::max(of_weight.states_size(), of_bias.states_size()));
            most = std::max(most, scratch.used());
            if (works) {
                if (drops) drop(all_d, saved, tensor_view(dropped, {rows, width_}), false, stream);
                apply_linear<T>(d.data, d.row_stride, weights_.transposed_merge(), width_, rows, columns, d_context, columns, stream);
                sum_over_tokens(of_weight, states, tensor_view(weights_.merge_gradient(), {width_, columns}), true, stream);
                launch("fill_ones", fill_ones<T>, dim3(1), vector, 0, stream, ones, offset_t{vector});
                of_bias.other = {ones, 0, 0, 0, 1, 1};
                sum_over_tokens(of_bias, states, tensor_view(weights_.merge_bias_gradient(), {width_, 1}), true, stream);
                if (d_x.size() > 0) check_cuda(cudaMemset2DAsync(d_x.data, pitch(d_x), 0, row_bytes(), static_cast<std::size_t>(rows), stream), "cudaMemset2DAsync");
            }
        }
        for_each_resolution(carver, saved, [&](index_t h, index_t places) {
            Carver scratch = carver;
            const Path path = make_path(scratch, saved, x, h, places, stream);
            const offset_t of_places = offset_t{batch} * places * width_, of_marks = offset_t{batch} * path.marks * width_;
            T* const d_out = scratch.template take<T>(of_places);
            T* const d_queries = scratch.template take<T>(of_places);
            T* const d_landmarks = scratch.template take<T>(2 * of_marks);
            if (works) {
                move_rows("gather_rows", gather_rows<T>, bucket(saved, h, places, d_out, d_context + (all ? h * width_ : 0), columns, true), stream);
                fill_zeros(d_queries, of_places, stream);
                fill_zeros(d_landmarks, 2 * of_marks, stream);
            }
            with_operator(scratch, saved, path, h, true, stream, [&](const auto& op, const OperatorCall<T>& call, const Rows<T>& values) {
                const auto d_heads = by_heads(static_cast<const T*>(d_out), places, width_, batch);
                const TensorView<T> d_keys = by_heads(d_landmarks, path.marks, 2 * width_, batch);
                Finish<T> finish_q, finish_v;
                set_target(finish_q, by_heads(d_queries, places, width_, batch));
                set_target(finish_v, by_heads(d_landmarks + width_, path.marks, 2 * width_, batch));
                const offset_t of_item = offset_t{places} * call.columns;
                if constexpr (kernel) {
                    const T* const g = packed_copy<T>(d_heads, scratch, stream);
                    const auto gradient_scratch = op.take_gradient(scratch);
                    if (scratch.counts()) return;
                    op.prepare_backward();
                    op.apply_transposed(packed_rows<T>(g, heads_, of_item, call.columns), finish_v);
                    op.gradient(gradient_scratch, Hops<T>{1, g, nullptr, values, places, call.columns, nullptr}, finish_q, d_keys);
                } else {
                    const Rows<T> g = as_rows(d_heads, heads_, scratch, stream);
                    T* const out = scratch.template take<T>(call.items() * of_item);
                    T* const of_product = op.take_product_gradient(scratch);
                    if (scratch.counts()) return;
                    op.prepare_backward();
                    op.apply(false, values, packed_finish(out, places, call.columns, heads_));
                    Finish<T> finish_k;
                    set_target(finish_k, d_keys);
                    op.product_gradient(of_product, g, packed_rows<T>(out, heads_, of_item, call.columns), values, &finish_v, finish_q, finish_k);
                }
            });
            T* const d_rows = scratch.template take<T>(of_places);
            T* const d_means = scratch.template take<T>(of_marks);
            T* const d_folded = scratch.template take<T>(offset_t{2} * width_ * width_);
            const TokenSum<T> of_query = TokenSum<T>::of_rows(d_queries, width_, path.rows, width_, batch * places), of_keys = TokenSum<T>::of_rows(d_landmarks, 2 * width_, path.means, width_, batch * path.marks);
            T* const states = scratch.template take<T>(std::max({of_query.states_size(), of_keys.states_size(), weights_.unfold_size()}));
            most = std::max(most, scratch.used());
            if (!works) return;
            const typename Weights::Folded folded = weights_.folded(h);
            // Queries: rows of x, scattered back.
            apply_linear<T>(d_queries, width_, folded.transposed_query, width_, batch * places, width_, d_rows, width_, stream);
            BucketRows<T> back = bucket(saved, h, places, d_rows, d_x.data, d_x.strides[2], false);
            back.columns = dim_;
            back.adds = true;
            move_rows("scatter_rows", scatter_rows<T>, back, stream);
            sum_over_tokens(of_query, states, tensor_view(d_folded, {width_, width_}), false, stream);
            weights_.unfold_query(h, d_folded, states, stream);
            // Landmarks: means of x, spread back.
            apply_linear<T>(d_landmarks, 2 * width_, folded.transposed_keys, 2 * width_, batch * path.marks, width_, d_means, width_, stream);
            const index_t length = lengths[static_cast<std::size_t>(h)];
            Finish<T> finish;
            const auto by_items = detail::make_view<T>(d_x.data, std::array<index_t, 4>{batch, 1, tokens, dim_}, std::array<std::ptrdiff_t, 4>{tokens * d_x.strides[2], 0, d_x.strides[2], 1}, "d_x");
            set_target(finish, by_items);
            finish.accumulate = true;
            compress_with<true>(MeanForm<T>{length}, CompressArguments<T>{x, packed_rows<T>(d_means, 1, offset_t{path.marks} * width_, width_), compression(saved, path.marks, stream), 0, finish});
            sum_over_tokens(of_keys, states, tensor_view(d_folded, {2 * width_, width_}), false, stream);
            weights_.unfold_keys(h, d_folded, states, stream);
        });
        if constexpr (learned) {
            constexpr bool learns = !std::is_same_v<Router, TopOne<Literal>>;
            if (!learns && recipe_.router.balance <= 0) return most;
            const index_t logit_columns = weights_.logit_columns();
            T* const d_logits = carver.template take<T>(offset_t{rows} * logit_columns);
            T* const d_folded = carver.template take<T>(offset_t{logit_columns} * width_);
            TokenSum<T> of_router = TokenSum<T>::of_rows(d_logits, logit_columns, nullptr, width_, rows);
            // Item by item, since rows of x that are padding may hold anything.
            of_router.values = packed_rows<T>(d_logits, 1, offset_t{tokens} * logit_columns, logit_columns);
            of_router.other = x;
            of_router.items = batch;
            of_router.tokens = tokens;
            of_router.lengths = routes.rows.lengths;
            T* const states = carver.template take<T>(std::max(of_router.states_size(), weights_.unfold_size()));
            most = std::max(most, carver.used());
            if (!works) return most;
            const RouterGradientArguments<T> arguments{routes.rows, routes.of_rows, routes.starts, saved.kept_.probabilities, context, d_context, columns, learns, gated, recipe_.router.balance, d_logits, logit_columns};
            launch("router_gradient", router_gradient<T>, dim3(blocks_for(rows, 4)), 128, 0, stream, arguments);
            apply_linear<T>(d_logits, logit_columns, weights_.transposed_router(), logit_columns, rows, dim_, d_x.data, d_x.strides[2], stream, true);
            sum_over_tokens(of_router, states, tensor_view(d_folded, {logit_columns, width_}), false, stream);
            weights_.unfold_router(d_folded, states, stream);
        }
        return most;
    }

    Inner inner_;
    Recipe recipe_;
    Weights weights_;
    index_t dim_, width_, heads_;  // width: dim, padded
};

}  // namespace nn

POLYATTN_END_NAMESPACE
