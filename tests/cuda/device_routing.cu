#include "device_routing.hpp"

#include <polyattn/backend/cuda/multi_resolution.cuh>
#include <polyattn/polyattn_cuda.cuh>

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
DeviceRouted<T> route_on_device(const DeviceRouter<T>& router, index_t batch, index_t tokens, index_t resolutions, const std::vector<index_t>& lengths, const Tensor<T>* queries,
                                const std::vector<DeviceLandmarks<T>>& landmarks, index_t heads, bool gated) {
    namespace cuda = detail::cuda;
    const bool all = !router.logits && !router.seed;
    const offset_t rows = offset_t{batch} * tokens;
    const cuda::DeviceArray<index_t> on_device(lengths);
    const CudaTensor<T> logits = router.logits ? CudaTensor<T>(router.logits, {rows, resolutions}) : CudaTensor<T>();
    const CudaTensor<T> probabilities({rows, resolutions});
    CudaTensor<T> q, out;
    std::vector<CudaTensor<T>> marks;
    cuda::MultiResolutionCall<T> call{};
    if (queries) {
        q = CudaTensor<T>(queries->data(), queries->shape);
        call.dim = static_cast<index_t>(queries->shape[1]);
        out = CudaTensor<T>({rows, offset_t{call.dim} * (all ? resolutions : 1)});
        call.queries = q.data();
        call.heads = heads;
        call.gates = gated ? probabilities.data() : nullptr;
        call.out = out.data();
        for (const auto& at : landmarks) {
            marks.emplace_back(at.rows->data(), at.rows->shape);
            call.landmarks.push_back({marks.back().data(), static_cast<index_t>(at.rows->shape[0] / batch), at.of_items});
        }
    }
    DeviceRouted<T> made;
    const auto run = [&](cuda::Carver carver) {
        cuda::Routing routing(carver, {batch, tokens, resolutions, {lengths.empty() ? nullptr : on_device.data(), tokens}}, all, nullptr);
        if (!carver.counts()) {
            if (router.logits) routing.choose<T>(logits.data(), probabilities.data());
            else if (router.seed) routing.draw(*router.seed, router.draw);
            else routing.send_to_all();
            routing.sort();
        }
        if (queries) cuda::multi_resolution_on_device(Attention<Kernel<ReLU>, Cuda>{}, carver, routing, call);
        if (!carver.counts()) {
            made.routes = to_host(routing.routes(), rows);
            made.starts = to_host(routing.starts(), offset_t{resolutions} * batch + 1);
            made.order = to_host(routing.order(), made.starts.back());
            if (router.logits) made.probabilities = to_host(probabilities.data(), rows * resolutions);
            if (queries) made.out = to_host(out.data(), out.size());
        }
        return carver.used();
    };
    CudaWorkspace workspace;
    workspace.reserve(run({}));
    run(cuda::Carver(workspace.data()));
    return made;
}

template DeviceRouted<float> route_on_device(const DeviceRouter<float>&, index_t, index_t, index_t, const std::vector<index_t>&, const Tensor<float>*, const std::vector<DeviceLandmarks<float>>&, index_t, bool);
template DeviceRouted<double> route_on_device(const DeviceRouter<double>&, index_t, index_t, index_t, const std::vector<index_t>&, const Tensor<double>*, const std::vector<DeviceLandmarks<double>>&, index_t, bool);
