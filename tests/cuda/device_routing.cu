#include "device_routing.hpp"

#include <polyattn/backend/cuda/routing.cuh>
#include <polyattn/backend/cuda/tensor.cuh>

using namespace polyattn;

namespace {

template <class T>
std::vector<T> to_host(const T* data, offset_t count) {
    std::vector<T> made(static_cast<std::size_t>(count));
    if (count > 0) detail::cuda::check_cuda(cudaMemcpy(made.data(), data, made.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return made;
}

}  // namespace

template <class T>
DeviceRouted<T> route_on_device(const DeviceRouter<T>& router, index_t batch, index_t tokens, index_t resolutions, const std::vector<index_t>& lengths) {
    namespace cuda = detail::cuda;
    const bool all = !router.logits && !router.seed;
    const offset_t rows = offset_t{batch} * tokens;
    const cuda::DeviceArray<index_t> on_device(lengths);
    const cuda::RoutedRows routed{batch, tokens, resolutions, {lengths.empty() ? nullptr : on_device.data(), tokens}};
    const CudaTensor<T> logits = router.logits ? CudaTensor<T>(router.logits, {rows, resolutions}) : CudaTensor<T>();
    const CudaTensor<T> probabilities({rows, resolutions});
    DeviceRouted<T> made;
    const auto run = [&](cuda::Carver carver) {
        const cuda::Routes routes = cuda::Routes::take(carver, routed, all);
        cuda::Routing routing(carver, routes, nullptr);
        if (carver.counts()) return carver.used();
        if (router.logits) routing.choose<T>(logits.data(), probabilities.data());
        else if (router.seed) routing.draw(*router.seed, router.draw);
        else routing.send_to_all();
        routing.sort();
        made.routes = to_host(routes.of_rows, rows);
        made.starts = to_host(routes.starts, offset_t{routed.buckets()} + 1);
        made.counts = to_host(routes.counts, routed.buckets());
        made.order = to_host(routes.order, made.starts.back());
        if (router.logits) made.probabilities = to_host(probabilities.data(), rows * resolutions);
        return carver.used();
    };
    CudaWorkspace workspace;
    workspace.reserve(run({}));
    run(cuda::Carver(workspace.data()));
    return made;
}

template DeviceRouted<float> route_on_device(const DeviceRouter<float>&, index_t, index_t, index_t, const std::vector<index_t>&);
template DeviceRouted<double> route_on_device(const DeviceRouter<double>&, index_t, index_t, index_t, const std::vector<index_t>&);
