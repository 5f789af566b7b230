#pragma once
// AdaMRA's attention proper: rows go to their resolutions, attend to the landmarks there, and come back.

#include <polyattn/backend/cuda/attention_layer.cuh>
#include <polyattn/backend/cuda/routing.cuh>

#include <bit>

POLYATTN_BEGIN_NAMESPACE

namespace detail::cuda {

/// Landmarks of one resolution, [batch x landmarks][2 dim]: keys, and beside them values.
template <class T>
struct ResolutionLandmarks {
    const T* data;
    index_t landmarks;                // of an item
    std::vector<index_t> of_items;    // those that are valid
};

/// What the attention of several resolutions takes: queries [rows][dim], projected for the resolution that each row goes to.
template <class T>
struct MultiResolutionCall {
    const T* queries;
    std::vector<ResolutionLandmarks<T>> landmarks;
    index_t dim, heads;
    const T* gates;  // probabilities [rows][resolutions] that rows are multiplied with, or null
    T* out;          // [rows][dim]; of a routing to all resolutions [rows][resolutions x dim], one after the other
};

/// One call of `layer` a resolution, on the gathered rows of all items. Of the rows' numbers the host has to know, so this waits for the stream. Padding
/// becomes 0. `carver` has, or counts, room for the gathered rows.
template <class Layer, class T>
void multi_resolution_on_device(const Layer& layer, Carver& carver, const Routing& routing, const MultiResolutionCall<T>& call, CudaOptions options = {}) {
    const RoutedRows& rows = routing.rows();
    const cudaStream_t stream = routing.stream();
    const offset_t numbers = offset_t{rows.rows()} * call.dim, out_stride = offset_t{call.dim} * (routing.all() ? rows.resolutions : 1);
    T* const gathered = carver.template take<T>(numbers);
    T* const made = carver.template take<T>(numbers);
    if (carver.counts() || numbers == 0) return;
    std::vector<index_t> starts(static_cast<std::size_t>(rows.buckets()) + 1);
    check_cuda(cudaMemcpyAsync(starts.data(), routing.starts(), starts.size() * sizeof(index_t), cudaMemcpyDeviceToHost, stream), "cudaMemcpyAsync of starts");
    check_cuda(cudaMemsetAsync(call.out, 0, static_cast<std::size_t>(offset_t{rows.rows()} * out_stride) * sizeof(T), stream), "cudaMemsetAsync");
    check_cuda(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
    options.stream = stream;
    for (index_t h = 0; h < rows.resolutions; ++h) {
        const ResolutionLandmarks<T>& marks = call.landmarks[static_cast<std::size_t>(h)];
        options.query_lengths.clear();
        for (index_t b = 0; b < rows.batch; ++b) {
            const auto bucket = static_cast<std::size_t>(h * rows.batch + b);
            options.query_lengths.push_back(starts[bucket + 1] - starts[bucket]);
        }
        options.key_lengths = marks.of_items;
        const index_t most = *std::max_element(options.query_lengths.begin(), options.query_lengths.end());
        if (most == 0) continue;
        // Few different numbers, so that the layer's plans are found again.
        const index_t places = std::min(rows.tokens, static_cast<index_t>(std::bit_ceil(static_cast<unsigned>(most)))), width = call.dim / call.heads;
        BucketRows<T> moved{rows, routing.order(), routing.starts(), h, places, call.dim, gathered, const_cast<T*>(call.queries), call.dim, nullptr};
        move_rows("gather_rows", gather_rows<T>, moved, stream);
        const auto view = [&]<class U>(U* data, index_t tokens, std::ptrdiff_t stride) {
            return detail::make_view<U>(data, std::array<index_t, 4>{rows.batch, call.heads, tokens, width}, std::array<std::ptrdiff_t, 4>{tokens * stride, width, stride, 1}, "rows");
        };
        layer.into(view(made, places, call.dim), view(static_cast<const T*>(gathered), places, call.dim), view(marks.data, marks.landmarks, 2 * call.dim), view(marks.data + call.dim, marks.landmarks, 2 * call.dim), options);
        moved.bucket = made;
        moved.all = call.out + (routing.all() ? h * call.dim : 0);
        moved.all_stride = out_stride;
        moved.gates = call.gates;
        move_rows("scatter_rows", scatter_rows<T>, moved, stream);
    }
}

}  // namespace detail::cuda

POLYATTN_END_NAMESPACE
