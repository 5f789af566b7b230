#pragma once

#include <polyattn/attention.hpp>

#include <mutex>

POLYATTN_BEGIN_NAMESPACE

namespace detail {

/// The functor of a lazy node. Elements read one by one come from a buffer that is filled once and shared by all copies; the
/// node alone on the right side of an assignment writes straight to the target.
template <class Layer, class Result>
class LazyAttention {
public:
    using value_type = typename Result::value_type;

    // Everything that can fail happens here: evaluation inside xtensor is noexcept.
    template <class Q, class K, class V>
    LazyAttention(Layer layer, const Q& q, const K& k, const V& v, CallOptions options)
        : state_(std::make_shared<State>(std::move(layer), q, k, v, std::move(options))) {}

    template <class... Index>
    value_type operator()(Index... index) const { return state_->result()(index...); }
    template <class It>
    value_type element(It first, It last) const { return state_->result().element(first, last); }
    template <class E>
    void assign_to(xt::xexpression<E>& target) const {
        if constexpr (has_memory<E>) state_->run(target.derived_cast());
        else xt::noalias(target.derived_cast()) = state_->result();
    }
    const auto& shape() const { return state_->buffer.shape(); }

private:
    struct State {
        template <class Q, class K, class V>
        State(Layer l, const Q& q_in, const K& k_in, const V& v_in, CallOptions o) : layer(std::move(l)), q(q_in), k(k_in), v(v_in), options(std::move(o)) {
            // A dry run of the checks, and the plans that evaluation will use.
            options.accumulate = false;
            options = layer.planned(q, k, v, std::move(options));
            auto shape = q.shape();
            shape.back() = v.shape().back();
            buffer.resize(shape);
        }
        template <class Out>
        void run(Out& out) const { layer.into(out, q, k, v, options); }
        const Result& result() {
            std::call_once(once, [&] { run(buffer); });
            return buffer;
        }
        Layer layer;
        Result q, k, v;  // by value: a lazy node must not dangle
        CallOptions options;
        Result buffer;
        std::once_flag once;
    };
    std::shared_ptr<State> state_;
};

}  // namespace detail

/// attention(q, k, v) as an xtensor expression that is evaluated when it is assigned. Alone on the right side it writes straight
/// to the target; inside a larger expression it is evaluated once into a buffer. Holds copies of its inputs. Shapes, options and the
/// pattern are checked here: throws invalid_input. Evaluation is noexcept inside xtensor, so a bias that throws (a TableBias whose
/// functor leaves its table) ends the program there. `options.workspace` must outlive the expression.
///     xt::xtensor<float, 4> y = x + polyattn::lazy(attention, q, k, v);
template <class... Ps, class Q, class K, class V>
auto lazy(const Attention<Ps...>& attention, const Q& q, const K& k, const V& v, CallOptions options = {}) {
    using Result = decltype(attention(q, k, v));
    using Functor = detail::LazyAttention<Attention<Ps...>, Result>;
    Functor functor(attention, q, k, v, std::move(options));
    const auto shape = functor.shape();
    return xt::detail::make_xgenerator(std::move(functor), shape);
}

POLYATTN_END_NAMESPACE
